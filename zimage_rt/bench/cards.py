"""Which card can run this? Predicted by each executor's own plan; a measured peak takes a prediction's place."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import BundleError, MemoryLimitError, RequestError
from zimage_runtime.executors.overheads import CARD
from zimage_runtime.executors.protocol import Hardware, Work
from zimage_runtime.executors.registry import EXECUTORS, executor_kind
from zimage_runtime.model.geometry import image_geometry

from .schema import OURS, Row
from .tables import gibibytes

CARDS_GB = (6, 8, 12, 16, 24)
"""Memory of common cards in GB, as they are sold: 2^30 bytes each."""

TOKENS = 64
"""Of a prompt of a few sentences."""

Predict = Callable[[int], int]
"""Bytes of memory → the peak of the plan for it. Raises `MemoryLimitError` where none fits."""


class Source(StrEnum):
    """Where an answer comes from."""

    MEASURED = "measured"
    PREDICTED = "predicted"


@dataclass(frozen=True)
class Answer:
    """Whether one card can generate one size. `peak` in bytes; None where no plan fits."""

    card_gb: int
    fits: bool
    peak: int | None
    source: Source

    @property
    def text(self) -> str:
        """A cell of the table."""
        size = "" if self.peak is None else f", {gibibytes(self.peak)}"
        return f"{'yes' if self.fits else 'no'}{size} ({self.source.value})"


@dataclass(frozen=True)
class CardRow:
    """The answers for a model, an executor and a size."""

    model: str
    executor: str
    size: str
    answers: tuple[Answer, ...]


def answers(predict: Predict, measured: int | None, cards: Iterable[int] = CARDS_GB) -> tuple[Answer, ...]:
    """One answer per card. `measured` is the peak of a run with memory to spare: where it fits, that is known."""
    found = []
    for card in cards:
        room = (card << 30) - CARD.nbytes
        if measured is not None and measured <= room:
            found.append(Answer(card, True, measured, Source.MEASURED))
            continue
        try:
            found.append(Answer(card, True, predict(room), Source.PREDICTED))
        except MemoryLimitError:
            found.append(Answer(card, False, None, Source.PREDICTED))
    return tuple(found)


def card_table(
    bundles: Iterable[tuple[str, Bundle]], sizes: Iterable[tuple[int, int]], rows: Iterable[Row]
) -> list[CardRow]:
    """Every bundle at every size that it has positions for, for each executor that it has programs for.

    For `cpu`, a card is a machine with so much memory free.
    """
    counted = [row for row in rows if _counts(row)]
    sizes, found = sorted(set(sizes), key=lambda size: size[0] * size[1]), []
    for name, bundle in bundles:
        for executor in EXECUTORS:
            for width, height in sizes:
                size = f"{width}x{height}"
                peak = _measured(counted, bundle, executor, size)
                try:
                    found.append(
                        CardRow(name, executor, size, answers(_predict(bundle, executor, (width, height)), peak))
                    )
                except (RequestError, BundleError):  # no positions for the size, or no programs for the executor
                    continue
    return found


def _predict(bundle: Bundle, executor: str, size: tuple[int, int]) -> Predict:
    kind, work = executor_kind(executor), Work(geometry=image_geometry(*size, bundle.manifest.config), tokens=TOKENS)
    return lambda room: kind.predict(bundle, work, Hardware(memory=room)).peak


def _measured(rows: Iterable[Row], bundle: Bundle, executor: str, size: str) -> int | None:
    """The last measured peak of a bundle, whichever of its fingerprints the row records."""
    wanted = (executor, size)
    matching = [row for row in rows if (row.case.executor, row.case.size) == wanted]
    peaks = [_peak(row) for row in matching if bundle.manifest.matches(row.case.fingerprint)]
    return peaks[-1] if peaks else None


def _counts(row: Row) -> bool:
    case = row.case
    return case.system == OURS and not case.low_memory and case.vram is None and row.memory is not None


def _peak(row: Row) -> int | None:
    """Of the device: a GPU's own, or for the CPU what is the process's own, for mapped files yield."""
    memory = row.memory
    if memory is None:
        return None
    value = (memory.anonymous if not executor_kind(row.case.executor).on_gpu else memory.gpu_process).value
    return None if value is None else int(value)
