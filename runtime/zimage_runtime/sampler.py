"""How latents move from one sigma to the next. float32 throughout, deterministic per seed."""

from collections.abc import Callable
from typing import Protocol

from .arrays import FloatArray
from .model.schedule import Schedule

Velocity = Callable[[FloatArray, int], FloatArray]
"""Latents and a step of the schedule → d latents / d sigma there, of the same shape."""


class Sampler(Protocol):
    """One way to solve the flow's differential equation."""

    @property
    def name(self) -> str:
        """On the command line and in a replay document."""

    @property
    def label(self) -> str:
        """In A1111's metadata."""

    def __call__(self, latents: FloatArray, step: int, schedule: Schedule, velocity: Velocity) -> FloatArray:
        """Latents [batch, channels, h, w] at the next sigma, from those at the sigma of `step`."""


class Euler:
    """One forward per step. Source: `FlowMatchEulerDiscreteScheduler.step` in diffusers."""

    name = "euler"
    label = "Euler"

    def __call__(self, latents: FloatArray, step: int, schedule: Schedule, velocity: Velocity) -> FloatArray:
        """`latents` + (next sigma - sigma) * velocity."""
        return latents + schedule.step_size(step) * velocity(latents, step)
