"""The sigmas that a model steps through: its own schedule, and three of ComfyUI's.

The model's own is diffusers' in float32, to the last bit or two: ``get_default_z_image_sigmas`` in
``pipeline_z_image.py`` and ``FlowMatchEulerDiscreteScheduler``. The others choose from a table of as many sigmas as
the model has training timesteps: ``simple_scheduler``, ``normal_scheduler`` with ``sgm`` and ``beta_scheduler`` in
ComfyUI's ``samplers.py`` (the last from arXiv 2407.12173), on its ``ModelSamplingDiscreteFlow``.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..arrays import FloatArray
from ..errors import RequestError
from .beta_distribution import beta_quantiles
from .config import SchedulerConfig
from .sampling_names import SchedulerName

DEFAULT_STEPS = 8
"""The number of steps that Z-Image Turbo is distilled for."""

MAX_STEPS = 256


@dataclass(frozen=True)
class Schedule:
    """Steps from pure noise to the image."""

    sigmas: FloatArray  # [steps + 1], from 1 down to 0
    timesteps: FloatArray  # [steps], the transformer's input: 1 - sigma

    @property
    def steps(self) -> int:
        """Steps, and sigmas at which the transformer is asked."""
        return len(self.timesteps)

    def step_size(self, index: int) -> np.float32:
        """sigma_next - sigma of step `index`; negative."""
        return np.float32(self.sigmas[index + 1] - self.sigmas[index])

    def image(self, latents: FloatArray, index: int, velocity: FloatArray) -> FloatArray:
        """Where the velocity at step `index` leads: an estimate of the image's latents."""
        estimate: FloatArray = latents - self.sigmas[index] * velocity
        return estimate


def make_schedule(
    steps: int,
    config: SchedulerConfig,
    scheduler: SchedulerName = SchedulerName.MODEL,
    shift: float | None = None,
) -> Schedule:
    """The schedule of `steps` steps, with another shift than the model's own if one is given.

    "beta" leaves out steps that fall on one training timestep, which happens from 139 steps on.
    Raises `RequestError` if `steps` is not 1 to 256.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"steps must be 1 to {MAX_STEPS}, not {steps}; Z-Image Turbo is made for 8")
    if shift is not None:
        config = replace(config, shift=shift)
    return schedule_through(_SIGMAS[scheduler](steps, config), config)


def schedule_through(sigmas: FloatArray, config: SchedulerConfig) -> Schedule:
    """The schedule through descending sigmas above 0, and from the last of them to 0."""
    train = np.float32(config.num_train_timesteps)
    timesteps = (train - sigmas * train) / train
    return Schedule(np.append(sigmas, np.float32(0)), timesteps)


def _shifted(sigmas: FloatArray, config: SchedulerConfig) -> FloatArray:
    shifted: FloatArray = config.shift * sigmas / (1 + (config.shift - 1) * sigmas)
    return shifted


def _model(steps: int, config: SchedulerConfig) -> FloatArray:
    return _shifted(_linspace(1.0, 1.0 / steps, steps), config)


def _table(config: SchedulerConfig) -> FloatArray:
    """The sigma of each training timestep, ascending to 1."""
    train = config.num_train_timesteps
    return _shifted(np.arange(1, train + 1, dtype=np.float32) / np.float32(train), config)


def _simple(steps: int, config: SchedulerConfig) -> FloatArray:
    """Evenly spaced entries of the table."""
    table = _table(config)
    stride = len(table) / steps
    chosen: FloatArray = table[[-1 - int(index * stride) for index in range(steps)]]
    return chosen


def _sgm_uniform(steps: int, config: SchedulerConfig) -> FloatArray:
    """Evenly spaced from the largest sigma down to the smallest, which is left out; then shifted.

    As in ComfyUI: its timestep of a sigma is the sigma, so that the ends were shifted before.
    """
    table = _table(config)
    return _shifted(_linspace(float(table[-1]), float(table[0]), steps + 1)[:-1], config)


def _beta(steps: int, config: SchedulerConfig) -> FloatArray:
    """Entries of the table at quantiles of the beta distribution of 0.6 and 0.6: more of them at both ends."""
    table = _table(config)
    quantiles = beta_quantiles(1 - np.arange(steps) / steps, 0.6)
    chosen = np.rint(quantiles * (len(table) - 1)).astype(np.int64)
    sigmas: FloatArray = table[chosen[np.append(True, np.diff(chosen) != 0)]]
    return sigmas


_SIGMAS = {
    SchedulerName.MODEL: _model,
    SchedulerName.SIMPLE: _simple,
    SchedulerName.SGM_UNIFORM: _sgm_uniform,
    SchedulerName.BETA: _beta,
}


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
