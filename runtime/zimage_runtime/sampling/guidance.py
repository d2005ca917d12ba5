"""How conditionings are combined to the velocity that a solver follows.

Classifier-free guidance as diffusers has it for Z-Image: ``pred = pos + g * (pos - neg)``, so that its g is the CFG
scale of A1111, ComfyUI and stable-diffusion.cpp minus 1. Source: ``pipeline_z_image.py`` in diffusers. Velocities are
[batch, channels, height / 8, width / 8]; each image of a batch is computed by itself, so that a batch gives its bits.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..arrays import FloatArray
from ..executors.protocol import Denoiser
from ..model.schedule import Schedule


class Guidance(Protocol):
    """A rule for one or more conditionings."""

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is needed at all."""

    def velocity(self, denoisers: tuple[Denoiser, ...], latents: FloatArray, step: int) -> FloatArray:
        """The velocity at a step. `denoisers`: the prompt's, then the negative prompt's if there is one."""


class NoGuidance:
    """The prompt alone, as the distilled model is made for: one forward per step."""

    guided = False

    def velocity(self, denoisers: tuple[Denoiser, ...], latents: FloatArray, step: int) -> FloatArray:
        """What the prompt's denoiser gives."""
        return denoisers[0](latents, step)


@dataclass(frozen=True)
class ClassifierFree:
    """Away from the negative prompt: two forwards for each step that is guided."""

    scale: float  # A1111's: 1 is none
    steps: tuple[bool, ...]  # which steps of the schedule are guided
    normalize: bool = False  # the result is at most as long as the prompt's own velocity

    guided = True

    def velocity(self, denoisers: tuple[Denoiser, ...], latents: FloatArray, step: int) -> FloatArray:
        """The prompt's velocity, moved away from the negative prompt's."""
        positive = denoisers[0](latents, step)
        if not self.steps[step]:
            return positive
        guided = positive + np.float32(self.scale - 1) * (positive - denoisers[1](latents, step))
        if self.normalize:
            for one, own in zip(guided, positive, strict=True):
                longest, length = np.linalg.norm(own), np.linalg.norm(one)
                if length > longest:
                    one *= longest / length
        return guided


def make_guidance(scale: float, schedule: Schedule, first_step: int, *, normalize: bool, truncation: float) -> Guidance:
    """The guidance of a request whose steps begin at `first_step` of the schedule.

    `truncation` is the share of the way, from 0 (noise) to 1 (the image), after which steps are no longer guided.
    Where that leaves no step, or the scale is 1, there is no guidance.
    """
    steps = tuple(bool(timestep <= truncation) for timestep in schedule.timesteps)
    if scale == 1 or not any(steps[first_step:]):
        return NoGuidance()
    return ClassifierFree(scale, steps, normalize)
