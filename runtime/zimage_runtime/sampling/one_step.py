"""Solvers that remember nothing of earlier steps."""

from dataclasses import dataclass

import numpy as np

from ..arrays import FloatArray
from ..model.schedule import Schedule
from .solver import Noise, Velocity


@dataclass(frozen=True)
class Euler:
    """One forward per step, first order. Source: ``FlowMatchEulerDiscreteScheduler.step`` in diffusers."""

    schedule: Schedule
    noise: Noise

    def step(self, latents: FloatArray, step: int, velocity: Velocity) -> FloatArray:
        """`latents` + (next sigma - sigma) * velocity."""
        return latents + self.schedule.step_size(step) * velocity(latents, step)


@dataclass(frozen=True)
class Heun:
    """Two forwards per step, second order; the last step is Euler's, for the model has no velocity at sigma 0.

    Source: ``FlowMatchHeunDiscreteScheduler.step`` in diffusers.
    """

    schedule: Schedule
    noise: Noise

    def step(self, latents: FloatArray, step: int, velocity: Velocity) -> FloatArray:
        """A step along the mean of the velocities at both of its ends."""
        size, here = self.schedule.step_size(step), velocity(latents, step)
        there = latents + size * here
        if step + 1 == self.schedule.steps:
            return there
        return latents + size * (np.float32(0.5) * (here + velocity(there, step + 1)))


@dataclass(frozen=True)
class Lcm:
    """One forward per step: the image as it is estimated, and new noise for the next sigma.

    Source: ``FlowMatchLCMScheduler.step`` in diffusers.
    """

    schedule: Schedule
    noise: Noise

    def step(self, latents: FloatArray, step: int, velocity: Velocity) -> FloatArray:
        """Mixes the estimate with noise."""
        following = self.schedule.sigmas[step + 1]
        image = self.schedule.image(latents, step, velocity(latents, step))
        if following == 0:
            return image
        noised: FloatArray = (np.float32(1) - following) * image + following * self.noise()
        return noised


@dataclass(frozen=True)
class EulerAncestral:
    """One forward per step: below the next sigma, and back up with new noise (eta 1).

    Source: ``LTXEulerAncestralRFScheduler.step`` in diffusers, which is ComfyUI's ``sample_euler_ancestral_RF``.
    """

    schedule: Schedule
    noise: Noise

    def step(self, latents: FloatArray, step: int, velocity: Velocity) -> FloatArray:
        """An Euler step to a lower sigma, scaled so that the new noise brings it to the next one."""
        sigma, following = (float(value) for value in self.schedule.sigmas[step : step + 2])
        image = self.schedule.image(latents, step, velocity(latents, step))
        if following == 0:
            return image
        down = following * following / sigma
        scale = (1 - following) / (1 - down)
        added = max(following**2 - down**2 * scale**2, 0.0) ** 0.5
        share = down / sigma
        lower = np.float32(share) * latents + np.float32(1 - share) * image
        return np.float32(scale) * lower + np.float32(added) * self.noise()
