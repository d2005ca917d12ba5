"""Summaries of repeated measurements, and confidence intervals of their ratios."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """A series in a few numbers. `deviation` is the sample's standard deviation, null for a single value."""

    count: int
    median: float
    p90: float
    least: float
    most: float
    deviation: float | None


def summarize(values: Sequence[float]) -> Summary:
    """The summary of at least one value. Raises `ValueError` for none."""
    if not values:
        raise ValueError("no values to summarize")
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(len(values), statistics.median(values), quantile(values, 0.9), min(values), max(values), deviation)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the sorted values lies, interpolated between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Interval:
    """A ratio of medians, and the bounds between which it lies with the confidence asked for."""

    ratio: float
    low: float
    high: float
    confidence: float

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 1: the two differ by more than their spread explains."""
        return self.low > 1 or self.high < 1


FEWEST = 3
"""Values on each side below which resampling says nothing."""


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], *, confidence: float = 0.95, resamples: int = 4000
) -> Interval | None:
    """The percentile bootstrap of median(numerator) / median(denominator); None for fewer than three values on a side.

    Both series are resampled on their own, because they come from separate processes. The generator's seed is fixed, so
    that a report is the same each time it is made. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 13.
    """
    if min(len(numerator), len(denominator)) < FEWEST:
        return None
    import numpy as np

    generator = np.random.default_rng(0)
    above, below = (
        np.median(generator.choice(np.asarray(values, np.float64), (resamples, len(values))), axis=1)
        for values in (numerator, denominator)
    )
    ratios = (above / below).tolist()
    outside = (1 - confidence) / 2
    ratio = statistics.median(numerator) / statistics.median(denominator)
    return Interval(ratio, quantile(ratios, outside), quantile(ratios, 1 - outside), confidence)
