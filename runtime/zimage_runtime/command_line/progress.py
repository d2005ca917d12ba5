"""Progress on stderr, or none if the user wants none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol


def printable(text: str) -> str:
    """A text without characters that break the line or control a terminal: it may quote what a file contains."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Advance(Protocol):
    """Called with how much more of a task is done."""

    def __call__(self, amount: int) -> None:
        """`amount` in the task's unit: bytes or steps."""


@dataclass(frozen=True)
class Progress:
    """Bars on stderr, or nothing when `quiet`."""

    quiet: bool = False

    @contextmanager
    def task(self, label: str, total: int, *, in_bytes: bool = False, unit: str = "step") -> Iterator[Advance]:
        """A task of so many bytes, or of what `unit` says; the bar shows amount, rate and time left."""
        from tqdm import tqdm

        with tqdm(
            total=total,
            desc=label,
            unit="B" if in_bytes else unit,
            unit_scale=in_bytes,
            unit_divisor=1000,
            disable=self.quiet,
            file=_Unfailing(sys.stderr),
            dynamic_ncols=True,
            leave=True,
        ) as bar:

            def advance(amount: int) -> None:
                bar.update(amount)

            yield advance

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the bar away while the block prints a line to stdout, which may be the same terminal."""
        if self.quiet:
            yield
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            yield

    def note(self, text: str) -> None:
        """Prints a line about progress, between bars."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Prints a line that the user must not miss, even when `quiet`."""
        from tqdm import tqdm

        tqdm.write(printable(text), file=_Unfailing(sys.stderr))


class _Unfailing:
    """A stream on which writing never fails.

    When the disk that stderr goes to is full, or its reader has gone, the image is worth more than its progress.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __eq__(self, other: object) -> bool:  # tqdm compares streams to find the bars in the way of a line
        return self._stream is getattr(other, "_stream", other)

    __hash__ = None  # type: ignore[assignment]  # as for any class that defines equality alone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
