"""UniPC of order 2, arXiv 2302.04867: each estimate of the image first corrects the step that led to it.

One forward per step. Source: ``UniPCMultistepScheduler`` in diffusers with flow sigmas, "bh2", predicting the image,
lower order at the end.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ..arrays import FloatArray
from ..model.schedule import Schedule
from .multistep import log_ratio
from .solver import Noise, Velocity

_ORDER = 2
_NEARLY_NOISE = float(np.float32(1) - np.float32(1e-6))
"""diffusers' first sigma in place of 1, whose log ratio is infinite."""


@dataclass
class UniPc:
    """The last two estimates, and where the last step started."""

    schedule: Schedule
    noise: Noise
    _images: list[FloatArray] = field(default_factory=list, init=False)  # estimates, the latest last
    _start: FloatArray | None = field(default=None, init=False)  # corrected latents at the last step
    _order: int = field(default=0, init=False)  # of the last step

    def step(self, latents: FloatArray, step: int, velocity: Velocity) -> FloatArray:
        """Corrects `latents`, then goes on from there."""
        image = self.schedule.image(latents, step, velocity(latents, step))
        if self._start is not None:
            latents = self._corrected(self._start, image, step)
        self._images = [*self._images[1 - _ORDER :], image]
        self._order = min(_ORDER, self.schedule.steps - step, len(self._images))
        self._start = latents
        return self._predicted(latents, step)

    def _ratio(self, step: int) -> float:
        return log_ratio(min(float(self.schedule.sigmas[step]), _NEARLY_NOISE))

    def _linear(self, start: FloatArray, image: FloatArray, step: int) -> tuple[FloatArray, float]:
        """The first-order step from `step` to the next, and the image's share in it."""
        sigma, following = (min(float(value), _NEARLY_NOISE) for value in self.schedule.sigmas[step : step + 2])
        share = 1 - following / sigma
        return np.float32(1 - share) * start + np.float32(share) * image, share

    def _predicted(self, latents: FloatArray, step: int) -> FloatArray:
        image = self._images[-1]
        linear, share = self._linear(latents, image, step)
        if self._order == 1:
            return linear
        here = self._ratio(step)
        behind = (self._ratio(step - 1) - here) / (self._ratio(step + 1) - here)
        predicted: FloatArray = linear + np.float32(share * 0.5 / behind) * (self._images[-2] - image)
        return predicted

    def _corrected(self, start: FloatArray, image: FloatArray, step: int) -> FloatArray:
        """Latents at `step` again, from `start` at the step before, with the estimate that was made here."""
        last = self._images[-1]
        linear, share = self._linear(start, last, step - 1)
        if self._order == 1:
            return linear + np.float32(share * 0.5) * (image - last)
        here = self._ratio(step - 1)
        h = self._ratio(step) - here
        behind = (self._ratio(step - 2) - here) / h
        # [1 1; behind 1] rho = b, where b_k = k! phi_(k+1)(-h) h / (1 - exp(-h)), in diffusers' terms
        phi = math.expm1(-h) / -h - 1
        first = phi / math.expm1(-h)
        second = 2 * (phi / -h - 0.5) / math.expm1(-h)
        back = (first - second) / (1 - behind)
        correction = np.float32(share * back / behind) * (self._images[-2] - last)
        corrected: FloatArray = linear + correction + np.float32(share * (first - back)) * (image - last)
        return corrected
