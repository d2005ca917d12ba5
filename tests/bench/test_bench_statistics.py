"""Summaries against numpy, and intervals that hold the truth as often as they say."""

import numpy as np
import pytest
from facts import raises_with

from zimage_rt.bench.statistics import quantile, ratio_of_medians, summarize


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_a_summary_is_numpys(count: int) -> None:
    values = np.random.default_rng(count).lognormal(size=count)
    found = summarize(list(values))
    assert (found.count, found.least, found.most) == (count, values.min(), values.max())
    assert found.median == pytest.approx(np.median(values))
    assert found.p90 == pytest.approx(np.quantile(values, 0.9))
    if count == 1:
        assert found.deviation is None
    else:
        assert found.deviation == pytest.approx(np.std(values, ddof=1))


@pytest.mark.parametrize("share", [0.0, 0.025, 0.5, 0.975, 1.0])
def test_a_quantile_is_numpys(share: float) -> None:
    values = np.random.default_rng(0).normal(size=37)
    assert quantile(list(values), share) == pytest.approx(np.quantile(values, share))


def test_nothing_has_no_summary() -> None:
    with raises_with(ValueError, "values"):
        summarize([])


def test_an_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    rng, held, rounds = np.random.default_rng(5), 0, 200
    for _ in range(rounds):
        slow, fast = 2 * rng.lognormal(sigma=0.1, size=25), rng.lognormal(sigma=0.1, size=25)
        interval = ratio_of_medians(list(slow), list(fast), confidence=0.9, resamples=300)
        assert interval is not None
        held += interval.low <= 2 <= interval.high
    assert 0.84 <= held / rounds <= 0.97


def test_equal_series_are_undecided_and_distant_ones_decided() -> None:
    rng = np.random.default_rng(1)
    same = ratio_of_medians(list(rng.normal(10, 1, 20)), list(rng.normal(10, 1, 20)))
    apart = ratio_of_medians(list(rng.normal(20, 1, 20)), list(rng.normal(10, 1, 20)))
    assert same is not None
    assert not same.decided
    assert apart is not None
    assert apart.decided
    assert apart.low < 2 < apart.high


def test_two_values_decide_nothing() -> None:
    assert ratio_of_medians([1.0, 2.0], [1.0, 2.0, 3.0]) is None
