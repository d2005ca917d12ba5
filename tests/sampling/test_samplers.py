"""Samplers against diffusers' schedulers, an independent statement in float64, and equations with known solutions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from solving import SHAPE, Field, schedule_of, solve, solve_with_diffusers

from zimage_runtime.arrays import FloatArray
from zimage_runtime.model.noise import TorchGenerator
from zimage_runtime.model.sampling_names import SamplerName, SchedulerName
from zimage_runtime.model.schedule import Schedule

TOLERANCE = 1e-5
SECOND_ORDER = (SamplerName.HEUN, SamplerName.DPMPP_2M, SamplerName.UNIPC, SamplerName.RES_MULTISTEP)
DETERMINISTIC = (SamplerName.EULER, *SECOND_ORDER)
NOISY = tuple(name for name in SamplerName if name.adds_noise)


def some_field(latents: Any, sigma: float) -> Any:
    """Not linear, and another one at each sigma."""
    return 0.6 * latents + math.sin(3 * sigma) + 0.3 * np.cos(2 * latents)


def diffusers_scheduler(name: SamplerName) -> Any:
    import diffusers

    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
    match name:
        case SamplerName.EULER:
            return diffusers.FlowMatchEulerDiscreteScheduler()
        case SamplerName.HEUN:
            return diffusers.FlowMatchHeunDiscreteScheduler()
        case SamplerName.DPMPP_2M:
            return diffusers.DPMSolverMultistepScheduler(**flow)
        case SamplerName.UNIPC:
            return diffusers.UniPCMultistepScheduler(**flow)
        case SamplerName.LCM:
            return diffusers.FlowMatchLCMScheduler()
        case SamplerName.EULER_ANCESTRAL:
            return diffusers.LTXEulerAncestralRFScheduler()
    raise AssertionError(f"diffusers has no {name}")


def assert_close(found: list[FloatArray], expected: list[FloatArray]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.deep
@pytest.mark.parametrize("name", [name for name in SamplerName if name is not SamplerName.RES_MULTISTEP])
@pytest.mark.parametrize(
    ("steps", "scheduler", "first"),
    [(1, "model", 0), (2, "model", 0), (8, "model", 0), (20, "beta", 0), (9, "sgm_uniform", 0), (8, "model", 3)],
)
def test_each_step_is_the_schedulers_own(name: SamplerName, steps: int, scheduler: str, first: int) -> None:
    schedule = schedule_of(steps, SchedulerName(scheduler))
    expected = solve_with_diffusers(diffusers_scheduler(name), some_field, schedule, first_step=first)
    assert_close(solve(name, some_field, schedule, first_step=first), expected)


@pytest.mark.deep
@pytest.mark.parametrize("name", [name for name in SamplerName if name is not SamplerName.RES_MULTISTEP])
def test_a_mask_between_steps_is_what_the_scheduler_would_see(name: SamplerName) -> None:
    """Half of the latents is replaced after each step, as inpainting does."""

    def blend(latents: FloatArray, step: int) -> FloatArray:
        blended = latents.copy()
        blended[..., :2] = 0.1 * step
        return blended

    schedule = schedule_of(6)
    expected = solve_with_diffusers(diffusers_scheduler(name), some_field, schedule, between=blend)
    assert_close(solve(name, some_field, schedule, between=blend), expected)


def res_multistep(field: Field, schedule: Schedule, latents: FloatArray, first: int) -> list[NDArray[np.float64]]:
    """ComfyUI's loop for eta 0, with its names, in float64."""

    def phi1(t: float) -> float:
        return math.expm1(t) / t

    def phi2(t: float) -> float:
        return (phi1(t) - 1.0) / t

    sigmas = schedule.sigmas.astype(np.float64)
    x, old_denoised, states = latents.astype(np.float64), None, [latents.astype(np.float64)]
    for i in range(first, len(sigmas) - 1):
        denoised = x - sigmas[i] * field(x, sigmas[i])
        if sigmas[i + 1] == 0 or old_denoised is None:
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        else:
            t, t_next, t_prev = -math.log(sigmas[i]), -math.log(sigmas[i + 1]), -math.log(sigmas[i - 1])
            h = t_next - t
            c2 = (t_prev - t) / h
            b1, b2 = phi1(-h) - phi2(-h) / c2, phi2(-h) / c2
            x = math.exp(-h) * x + h * (b1 * denoised + b2 * old_denoised)
        old_denoised = denoised
        states.append(x)
    return states


@pytest.mark.parametrize(("steps", "first"), [(1, 0), (2, 0), (8, 0), (30, 0), (8, 3)])
def test_res_multistep_is_its_statement_in_float64(steps: int, first: int) -> None:
    schedule = schedule_of(steps)
    found = solve(SamplerName.RES_MULTISTEP, some_field, schedule, first_step=first)
    expected = res_multistep(some_field, schedule, found[0], first)
    assert_close(found, [state.astype(np.float32) for state in expected])


def wave(latents: Any, sigma: float) -> Any:
    """dx / dsigma = 2 cos(3 sigma) sin(x)."""
    return 2 * math.cos(3 * sigma) * np.sin(latents)


def where_the_wave_leads(start: FloatArray, first: float, last: float) -> NDArray[np.float64]:
    """The solution: tan(x / 2) grows by exp of the integral of 2 cos(3 sigma)."""
    x = start.astype(np.float64)
    turns = np.rint(x / (2 * np.pi)) * 2 * np.pi
    growth = math.exp(2 / 3 * (math.sin(3 * last) - math.sin(3 * first)))
    return turns + 2 * np.arctan(np.tan((x - turns) / 2) * growth)


def slope(name: SamplerName, schedule: Callable[[int], Schedule]) -> float:
    """The order that errors show between 16 and 128 steps."""

    def error(steps: int) -> float:
        sigmas = schedule(steps).sigmas
        states = solve(name, wave, schedule(steps))
        return float(np.linalg.norm(states[-1] - where_the_wave_leads(states[0], float(sigmas[0]), float(sigmas[-1]))))

    return math.log(error(16) / error(128)) / math.log(128 / 16)


def inner(steps: int) -> Schedule:
    """Not from noise to image, where the logarithms that most second-order solvers step along are infinite."""
    sigmas = np.linspace(0.9, 0.1, steps + 1, dtype=np.float32)
    return Schedule(sigmas, 1 - sigmas[:-1])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_errors_shrink_with_the_order(name: SamplerName) -> None:
    assert slope(name, inner) >= (1.8 if name in SECOND_ORDER else 0.9)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_errors_shrink_from_noise_to_image(name: SamplerName) -> None:
    """At both ends, steps along a logarithm do not become small: there, less than the order is left of some."""
    found = slope(name, schedule_of)
    assert found >= {SamplerName.EULER: 0.9, SamplerName.HEUN: 1.8, SamplerName.UNIPC: 1.8}.get(name, 1.3)


@pytest.mark.parametrize("name", SamplerName)
def test_a_batch_is_each_image_alone(name: SamplerName) -> None:
    schedule, seeds = schedule_of(5), (3, 2**32 + 4, 7)
    together = solve(name, some_field, schedule, seeds=seeds)[-1]
    for one, seed in zip(together, seeds, strict=True):
        (alone,) = solve(name, some_field, schedule, seeds=(seed,))[-1]
        np.testing.assert_array_equal(one, alone)


@pytest.mark.parametrize("name", SamplerName)
def test_what_is_added_is_the_seeds_own_noise(name: SamplerName) -> None:
    """Samplers that add noise draw it after the start's from the same generator; the others draw none."""
    schedule = schedule_of(3)
    draws = []

    def counted(latents: FloatArray, step: int) -> FloatArray:
        draws.append(latents)
        return latents

    states = solve(name, lambda latents, sigma: 0 * latents, schedule, seeds=(5,), between=counted)
    if name not in NOISY:
        for state in states[1:]:  # nothing moves where there is no velocity
            np.testing.assert_allclose(state, states[0], rtol=1e-6)
        return
    generator = TorchGenerator(5)
    start, added = generator.normals(SHAPE), generator.normals(SHAPE)
    expected = np.stack([start.ravel(), added.ravel()], axis=1)
    weights, residue, *_ = np.linalg.lstsq(expected, states[1].ravel(), rcond=None)
    assert residue < 1e-6
    assert weights.min() > 0.05
