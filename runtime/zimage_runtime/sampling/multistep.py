"""Solvers that use the last step's estimate of the image: second order at one forward per step.

Both integrate the linear part of the equation exactly. They differ in the time along which they extrapolate:
``dpmpp_2m`` in log(alpha / sigma), ``res_multistep`` in -log(sigma).
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ..arrays import FloatArray
from ..model.schedule import Schedule
from .solver import Noise, Velocity


def log_ratio(sigma: float) -> float:
    """log(alpha / sigma), where alpha is 1 - sigma: minus infinity for pure noise, infinity for the image."""
    if sigma <= 0:
        return math.inf
    return -math.inf if sigma >= 1 else math.log(1 - sigma) - math.log(sigma)


@dataclass
class _Estimating:
    """Keeps the last estimate of the image. The first step that is taken has none, wherever it is in the schedule."""

    schedule: Schedule
    noise: Noise
    _last: FloatArray | None = field(default=None, init=False)

    def step(self, latents: FloatArray, step: int, velocity: Velocity) -> FloatArray:
        """Latents at the next sigma; first order without an earlier estimate, and to sigma 0."""
        image = self.schedule.image(latents, step, velocity(latents, step))
        last, self._last = self._last, image
        sigma, following = (float(value) for value in self.schedule.sigmas[step : step + 2])
        if following == 0:
            return image
        share = following / sigma
        aim = image if last is None else self._aim(image, last, step)
        return np.float32(share) * latents + np.float32(1 - share) * aim

    def _aim(self, image: FloatArray, last: FloatArray, step: int) -> FloatArray:
        """What to take for the image over the step, from the estimates at its start and before."""
        raise NotImplementedError


class Dpmpp2M(_Estimating):
    """DPM-Solver++(2M), arXiv 2211.01095.

    Source: ``DPMSolverMultistepScheduler`` in diffusers: "dpmsolver++", "midpoint", order 2, flow sigmas.
    """

    def _aim(self, image: FloatArray, last: FloatArray, step: int) -> FloatArray:
        before, here, there = (log_ratio(float(sigma)) for sigma in self.schedule.sigmas[step - 1 : step + 2])
        # after pure noise, the last estimate is infinitely far back and counts for nothing
        share = (there - here) / (here - before)
        # alpha (1 - exp(-h)) is 1 - sigma_t / sigma_s, the share that the image has in the step
        return image + np.float32(0.5 * share) * (image - last)


class ResMultistep(_Estimating):
    """The second-order exponential integrator of arXiv 2308.02157, without added noise.

    Source: ``res_multistep`` in ComfyUI's ``k_diffusion/sampling.py`` with eta 0, restated.
    """

    def _aim(self, image: FloatArray, last: FloatArray, step: int) -> FloatArray:
        before, here, there = (-math.log(float(sigma)) for sigma in self.schedule.sigmas[step - 1 : step + 2])
        h, back = there - here, before - here
        first = -math.expm1(-h) / h  # phi 1 of -h
        second = (first - 1) / -h  # phi 2 of -h
        weight = second * h / back
        # ComfyUI's sum has weights h (first - weight) and h weight; h first is the share of the image in the step
        return image + np.float32(weight / first) * (last - image)
