"""How tolerant the demo's checker is: as much for one shape as for another, and not with what is no shape."""

import numpy as np
import pytest
from numpy.typing import NDArray
from outlines import blob, letter, painted, wavering

from demo_model.checker import see
from demo_model.scenes import SHAPES, Shape

pytestmark = pytest.mark.deep

WAVER = 0.04
"""Of the diameter. The most at which the nearest outline is still the right one in 97 of 100 cases, for every shape."""


def named(area: NDArray[np.bool_]) -> Shape | None:
    """The shape that is seen; None where none is, or more than one area."""
    seen = see(painted(area))
    return seen[0].shape if len(seen) == 1 else None


@pytest.mark.parametrize("shape", SHAPES)
def test_nineteen_of_twenty_wavering_outlines_are_accepted(shape: Shape) -> None:
    rng = np.random.default_rng([5, SHAPES.index(shape)])
    accepted = np.mean([named(wavering(shape, WAVER, rng)) == shape for _ in range(60)])
    assert accepted >= 0.85  # 0.95, but for chance; that it is not simply tolerant is the next test's


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_that_waver_three_times_as_much_are_mostly_refused(shape: Shape) -> None:
    rng = np.random.default_rng([6, SHAPES.index(shape)])
    assert np.mean([named(wavering(shape, 3 * WAVER, rng)) == shape for _ in range(20)]) < 0.5


def test_what_is_no_shape_is_mostly_refused() -> None:
    rng = np.random.default_rng(7)
    blobs = [blob(rng) for _ in range(40)]
    letters = [letter(character) for character in "ABCEFGHKLMNPRSTUVWXYZ2345679"]  # O, D, Q, 0: rings, near enough
    y, x = np.mgrid[-64:64, -64:64]
    cross = (abs(y) < 12) & (abs(x) < 45) | (abs(x) < 12) & (abs(y) < 45)
    for areas, most in ((blobs, 0.25), (letters, 0.25), ([cross], 0.0)):
        assert np.mean([named(area) is not None for area in areas]) <= most
