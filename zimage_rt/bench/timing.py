"""Calls that take turns on the clock, and how many times faster one is than another."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, in rounds A B C A B C, so that a slow minute of the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How many times faster one variant is than another, over the rounds in which both ran."""

    median: float
    least: float
    most: float


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """The ratios of two interleaved series, round by round."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def median_seconds(call: Callable[[], object], repeat: int) -> float:
    """The median of `repeat` calls, after one that does not count."""
    call()
    return statistics.median(interleave({"": call}, repeat)[""])
