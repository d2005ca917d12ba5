"""Starting from an image instead of noise, and keeping what a mask keeps.

The image's latents are sampled from the encoder's distribution with the seed's generator, and then the noise from the
same generator. They are mixed at the sigma of the first step that is run: the lower the strength, the later that step.
With a mask, the kept part is restored after each step, with the same noise at the sigma that the step led to.
Source: ``pipeline_z_image_img2img.py`` and ``pipeline_z_image_inpaint.py`` in diffusers. Latents are
[batch, channels, height / 8, width / 8].
"""

from dataclasses import dataclass

import numpy as np

from ..arrays import FloatArray
from ..errors import RequestError
from ..model.config import VaeConfig
from ..model.noise import BatchNoise

DEFAULT_STRENGTH = 0.6
DEFAULT_MASKED_STRENGTH = 1.0
"""The defaults of diffusers' two pipelines."""


def steps_skipped(steps: int, strength: float) -> int:
    """How many of the schedule's first steps a strength leaves out. Raises `RequestError` where none remains."""
    if not 0 < strength <= 1:  # also false for not-a-number
        raise RequestError(f"strength must be more than 0 and at most 1, not {strength:g}")
    skipped = int(steps - steps * strength)
    if skipped >= steps:
        raise RequestError(f"strength {strength:g} leaves none of {steps} steps; raise either")
    return skipped


@dataclass(frozen=True)
class Encoded:
    """An image as the encoder sees it: a normal distribution of latents, before shift and scaling."""

    mean: FloatArray  # [1, channels, height / 8, width / 8]
    logvar: FloatArray

    def sample(self, noise: BatchNoise, config: VaeConfig) -> FloatArray:
        """Latents of the image for each seed, drawn with its noise: [seeds, channels, height / 8, width / 8]."""
        deviation = np.exp(np.float32(0.5) * self.logvar)
        sampled = self.mean + deviation * noise.draw()
        latents: FloatArray = (sampled - np.float32(config.shift_factor)) * np.float32(config.scaling_factor)
        return latents


@dataclass(frozen=True)
class Start:
    """Where a batch's latents start from, and which part of them is kept."""

    clean: FloatArray  # latents of the image
    noise: FloatArray
    mask: FloatArray | None  # [1, 1, height / 8, width / 8]: 1 is repainted, 0 is kept

    def at(self, sigma: np.float32) -> FloatArray:
        """The image's latents with the share of noise that `sigma` states."""
        return sigma * self.noise + (np.float32(1) - sigma) * self.clean

    def kept(self, latents: FloatArray, sigma: np.float32) -> FloatArray:
        """Latents after a step that led to `sigma`, with the image restored where the mask keeps it."""
        if self.mask is None:
            return latents
        return (np.float32(1) - self.mask) * self.at(sigma) + self.mask * latents
