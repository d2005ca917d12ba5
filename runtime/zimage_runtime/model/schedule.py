"""The sigmas of the flow-matching Euler schedule, as diffusers computes them in float32, to the last bit or two.

Source: ``get_default_z_image_sigmas`` in ``pipeline_z_image.py`` and ``FlowMatchEulerDiscreteScheduler``.
"""

from dataclasses import dataclass

import numpy as np

from ..arrays import FloatArray
from ..errors import RequestError
from .config import SchedulerConfig

DEFAULT_STEPS = 8
"""The number of steps that Z-Image Turbo is distilled for."""

MAX_STEPS = 256


@dataclass(frozen=True)
class Schedule:
    """`steps` Euler steps from pure noise to the image."""

    sigmas: FloatArray  # [steps + 1], from 1 down to 0
    timesteps: FloatArray  # [steps], the transformer's input: 1 - sigma

    @property
    def steps(self) -> int:
        """Forwards of the transformer."""
        return len(self.timesteps)

    def step_size(self, index: int) -> np.float32:
        """sigma_next - sigma of step `index`; negative."""
        return np.float32(self.sigmas[index + 1] - self.sigmas[index])


def make_schedule(steps: int, config: SchedulerConfig) -> Schedule:
    """The schedule of `steps` forwards. Raises `RequestError` if `steps` is not 1 to 256."""
    if not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"steps must be 1 to {MAX_STEPS}, not {steps}; Z-Image Turbo is made for 8")
    sigmas = _linspace(1.0, 1.0 / steps, steps)
    shift = config.shift
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    train = np.float32(config.num_train_timesteps)
    timesteps = (train - sigmas * train) / train
    return Schedule(np.append(sigmas, np.float32(0)), timesteps)


def _linspace(start: float, end: float, count: int) -> FloatArray:
    """torch.linspace in float32, which counts from both ends towards the middle."""
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = (last - first) / np.float32(count - 1)
    index = np.arange(count)
    ascending = first + step * index.astype(np.float32)
    descending = last - step * (count - 1 - index).astype(np.float32)
    return np.where(index < count // 2, ascending, descending).astype(np.float32)
