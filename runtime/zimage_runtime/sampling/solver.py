"""How latents move from one sigma to the next. float32 throughout, deterministic per seed."""

from collections.abc import Callable
from typing import Protocol

from ..arrays import FloatArray

Velocity = Callable[[FloatArray, int], FloatArray]
"""Latents and a step of the schedule → d latents / d sigma at that step's sigma, of the same shape."""

Noise = Callable[[], FloatArray]
"""Draws the next standard normals of a batch, [batch, channels, h, w], each image's from its own seed."""


class Solver(Protocol):
    """One batch on its way through a schedule: what it remembers of earlier steps is its own."""

    def step(self, latents: FloatArray, step: int, velocity: Velocity) -> FloatArray:
        """Latents [batch, channels, h, w] at the next sigma, from those at the sigma of `step`.

        Steps are taken in order; the first one need not be the schedule's.
        """
