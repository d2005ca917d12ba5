"""How conditionings are combined to the velocity that a sampler follows."""

from typing import Protocol

from .arrays import FloatArray
from .executors.protocol import Denoiser


class Guidance(Protocol):
    """A rule for one or more conditionings."""

    def velocity(self, positive: Denoiser, latents: FloatArray, step: int) -> FloatArray:
        """The velocity at a step: [batch, channels, height / 8, width / 8], in and out."""


class NoGuidance:
    """The prompt alone, as the distilled model is made for: one forward per step."""

    def velocity(self, positive: Denoiser, latents: FloatArray, step: int) -> FloatArray:
        """What the denoiser gives."""
        return positive(latents, step)
