"""The rate of matrix products that times are estimated from."""

from collections.abc import Callable

import pytest

from zimage_runtime.machine import matrix_rate
from zimage_runtime.machine.matrix_rate import float_rate, integer_rate, quick_rate


@pytest.mark.parametrize("rate", [float_rate, integer_rate])
def test_a_rate_is_of_all_operations_in_the_best_time(rate: Callable[..., float]) -> None:
    ticks = iter([10.0, 14.0, 20.0, 22.0, 30.0, 35.0])
    assert rate(64, 3, lambda: next(ticks)) == pytest.approx(2 * 64**3 / 2.0)


@pytest.mark.parametrize("integer", [False, True])
def test_a_quick_rate_is_measured_once(integer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    product = matrix_rate._Product

    def count(operator: str, *rest: object) -> object:
        made.append(operator)
        return product(operator, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(matrix_rate, "_Product", count)
    quick_rate.cache_clear()
    first = quick_rate(integer)
    assert 1e6 < first < 1e15
    assert quick_rate(integer) == first
    assert made == ["MatMulInteger" if integer else "MatMul"]
