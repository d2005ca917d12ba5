"""Ways through a schedule: ours, and those of diffusers' schedulers, on one velocity field."""

from collections.abc import Callable
from typing import Any

import numpy as np

from zimage_runtime.arrays import FloatArray
from zimage_runtime.model.config import SchedulerConfig
from zimage_runtime.model.noise import BatchNoise, TorchGenerator
from zimage_runtime.model.sampling_names import SamplerName, SchedulerName
from zimage_runtime.model.schedule import Schedule, make_schedule
from zimage_runtime.sampling.samplers import make_solver

TURBO = SchedulerConfig(shift=3.0, num_train_timesteps=1000)
SHAPE = (1, 4, 6, 5)

Field = Callable[[Any, float], Any]
"""Latents and sigma → velocity."""


def schedule_of(steps: int, scheduler: SchedulerName = SchedulerName.MODEL) -> Schedule:
    return make_schedule(steps, TURBO, scheduler)


def solve(
    name: SamplerName,
    field: Field,
    schedule: Schedule,
    *,
    seeds: tuple[int, ...] = (0,),
    first_step: int = 0,
    between: Callable[[FloatArray, int], FloatArray] = lambda latents, step: latents,
) -> list[FloatArray]:
    """Latents at the start and after each step. `between` alters them after each, as inpainting does."""
    noise = BatchNoise(tuple(TorchGenerator(seed) for seed in seeds), SHAPE)
    states = [noise.draw()]
    solver = make_solver(name, schedule, noise.draw)

    def velocity(latents: FloatArray, step: int) -> FloatArray:
        return np.asarray(field(latents, float(schedule.sigmas[step])), np.float32)

    for step in range(first_step, schedule.steps):
        states.append(between(solver.step(states[-1], step, velocity), step))
    return states


def solve_with_diffusers(
    scheduler: Any,
    field: Field,
    schedule: Schedule,
    *,
    seed: int = 0,
    first_step: int = 0,
    between: Callable[[FloatArray, int], FloatArray] = lambda latents, step: latents,
) -> list[FloatArray]:
    """The scheduler's own `step` on our sigmas and float timesteps, which no pipeline would give it."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    states = [torch.randn(SHAPE, generator=generator)]
    heun = "Heun" in type(scheduler).__name__
    sigmas, order = torch.from_numpy(schedule.sigmas.copy()), 2 if heun else 1
    if "UniPC" in type(scheduler).__name__:
        sigmas[0] = min(sigmas[0], torch.tensor(1 - 1e-6))  # as its `set_timesteps` does
    scheduler.set_timesteps(num_inference_steps=schedule.steps)
    if heun:
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas[:-1] * 1000
    scheduler.num_inference_steps = schedule.steps
    scheduler.set_begin_index(first_step * order)
    takes_generator = any(kind in type(scheduler).__name__ for kind in ("LCM", "Ancestral"))
    options = {"generator": generator} if takes_generator else {}
    latents = states[0]
    for index in range(first_step * order, len(sigmas) - 1):
        at = sigmas[index]
        velocity = torch.from_numpy(np.asarray(field(latents.numpy(), float(at)), np.float32))
        latents = scheduler.step(velocity, scheduler.timesteps[index], latents, **options).prev_sample
        done = not heun or scheduler.dt is None or index == len(sigmas) - 2
        if done:
            latents = torch.from_numpy(between(latents.numpy(), first_step + len(states) - 1))
            states.append(latents)
    return [state.numpy() for state in states]
