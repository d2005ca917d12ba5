"""Progress on stderr, or none if the user wants none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


class Advance(Protocol):
    """Called with how much more of a task is done."""

    def __call__(self, amount: int) -> None:
        """`amount` in the task's unit: bytes or steps."""


@dataclass(frozen=True)
class Progress:
    """Bars on stderr, or nothing when `quiet`."""

    quiet: bool = False

    @contextmanager
    def task(self, label: str, total: int, *, in_bytes: bool = False) -> Iterator[Advance]:
        """A task of `total` steps or bytes; the bar shows amount, rate and time left."""
        from tqdm import tqdm

        with tqdm(
            total=total,
            desc=label,
            unit="B" if in_bytes else "step",
            unit_scale=in_bytes,
            unit_divisor=1000,
            disable=self.quiet,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=True,
        ) as bar:

            def advance(amount: int) -> None:
                bar.update(amount)

            yield advance

    def note(self, text: str) -> None:
        """Prints a line about progress, between bars."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Prints a line that the user must not miss, even when `quiet`."""
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
