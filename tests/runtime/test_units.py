"""Amounts of memory as text: what is needed rounds up, what is free rounds down."""

from hypothesis import given
from hypothesis import strategies as st

from zimage_runtime.units import gib, gib_free, gib_needed

GIB = 1 << 30


def number(text: str) -> float:
    amount, unit = text.split()
    assert unit == "GiB"
    return float(amount)


@given(st.integers(0, 1 << 44), st.integers(0, 3))
def test_needed_is_enough_and_free_is_there(nbytes: int, digits: int) -> None:
    needed, free = number(gib_needed(nbytes, digits)), number(gib_free(nbytes, digits))
    assert free * GIB <= nbytes + 1e-6 * GIB
    assert needed * GIB >= nbytes - 1e-6 * GIB
    assert needed - free <= 1.5 * 10**-digits


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_what_does_not_fit_never_reads_as_if_it_did(free: int, more: int) -> None:
    assert number(gib_needed(free + more)) > number(gib_free(free))


def test_the_nearest() -> None:
    assert [gib(GIB), gib(int(1.26 * GIB), 1), gib(int(1.256 * GIB), 2)] == ["1.0 GiB", "1.3 GiB", "1.26 GiB"]
