"""Which card can run this? Predicted from the memory plan; a measured peak takes a prediction's place.

A planner gives the peak of a request in bytes for a budget, or raises `MemoryLimitError`. TensorRT's has what engines
take beside weights from the bundle's catalog, where it was written when they were built.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, TENSORRT
from zimage_runtime.errors import MemoryLimitError, RequestError
from zimage_runtime.executors.ort.cpu_plan import plan_memory
from zimage_runtime.executors.ort.device_plan import plan_vram
from zimage_runtime.model.geometry import ImageGeometry, image_geometry

from .schema import OURS, Row
from .tables import gibibytes

CARDS_GB = (6, 8, 12, 16, 24)
"""Memory of common cards in GB, as they are sold: 2^30 bytes each."""

RESERVED = 512 << 20
"""What the driver and a desktop keep of a card's memory for themselves."""

TOKENS = 64
"""Of a prompt of a few sentences."""

Planner = Callable[[ImageGeometry, int], int]


def _cpu(bundle: Bundle) -> Planner | None:
    if CPU not in bundle.manifest.executors:
        return None
    return lambda geometry, budget: plan_memory(bundle.manifest, geometry, TOKENS, available=budget).peak


def _cuda(bundle: Bundle) -> Planner | None:
    if CUDA not in bundle.manifest.executors:
        return None
    return lambda geometry, budget: plan_vram(bundle.manifest, geometry, TOKENS, budget).peak


def _tensorrt(bundle: Bundle) -> Planner | None:
    if bundle.manifest.engines is None:
        return None
    from zimage_runtime.executors.tensorrt.engine_store import read_catalog
    from zimage_runtime.executors.tensorrt.plan import plan_residency
    from zimage_runtime.executors.tensorrt.stage_sizes import ImageSizes
    from zimage_runtime.machine.gpu_targets import Variant

    variants, config = read_catalog(bundle).variants, bundle.manifest.config
    spec = variants.get(Variant.AMPERE) or variants.get(Variant.TURING)
    if spec is None:
        return None
    return lambda geometry, budget: plan_residency(spec, config, ImageSizes.of(geometry, TOKENS, 1), budget).peak


PLANNERS: Mapping[str, Callable[[Bundle], Planner | None]] = {TENSORRT: _tensorrt, CUDA: _cuda, CPU: _cpu}
"""By executor, the planner of a bundle; None where it has nothing that the executor runs. For `cpu` a card is a machine
with so much memory free."""


class Source(StrEnum):
    """Where an answer comes from."""

    MEASURED = "measured"
    PREDICTED = "predicted"


@dataclass(frozen=True)
class Answer:
    """Whether one card can draw one size. `peak` in bytes; None where no plan fits."""

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


def answers(
    planner: Planner, geometry: ImageGeometry, measured: int | None, cards: Iterable[int] = CARDS_GB
) -> tuple[Answer, ...]:
    """One answer a card. `measured` is the peak of a run with memory to spare: where it fits, that is known."""
    found = []
    for card in cards:
        room = (card << 30) - RESERVED
        if measured is not None and measured <= room:
            found.append(Answer(card, True, measured, Source.MEASURED))
            continue
        try:
            found.append(Answer(card, True, planner(geometry, room), Source.PREDICTED))
        except MemoryLimitError:
            found.append(Answer(card, False, None, Source.PREDICTED))
    return tuple(found)


def card_table(
    bundles: Iterable[tuple[str, Bundle]], sizes: Iterable[tuple[int, int]], rows: Iterable[Row]
) -> list[CardRow]:
    """Every bundle at every size that it can draw, for each executor that has a planner and a program."""
    peaks = {(row.case.fingerprint, row.case.executor, row.case.size): _peak(row) for row in rows if _counts(row)}
    sizes, found = sorted(set(sizes), key=lambda size: size[0] * size[1]), []
    for name, bundle in bundles:
        manifest = bundle.manifest
        for executor, planner_of in PLANNERS.items():
            planner = planner_of(bundle)
            if planner is None:
                continue
            for width, height in sizes:
                size = f"{width}x{height}"
                peak = peaks.get((manifest.fingerprint, executor, size))
                try:
                    geometry = image_geometry(width, height, manifest.config)
                    found.append(CardRow(name, executor, size, answers(planner, geometry, peak)))
                except RequestError:  # a size that this model has no positions for
                    continue
    return found


def _counts(row: Row) -> bool:
    case = row.case
    return case.system == OURS and not case.low_memory and case.vram is None and row.memory is not None


def _peak(row: Row) -> int | None:
    """Of the device: a GPU's own, or for the CPU what is the process's own, for mapped files yield."""
    memory = row.memory
    if memory is None:
        return None
    value = (memory.anonymous if row.case.executor == CPU else memory.gpu_process).value
    return None if value is None else int(value)
