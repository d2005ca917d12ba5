"""The schedules that ComfyUI has, against its functions restated in torch; and the beta distribution."""

import math
from typing import Any

import numpy as np
import pytest

from zimage_runtime.errors import RequestError
from zimage_runtime.events import Request
from zimage_runtime.model.beta_distribution import beta_quantiles
from zimage_runtime.model.config import SchedulerConfig
from zimage_runtime.model.sampling_names import SchedulerName
from zimage_runtime.model.schedule import MAX_STEPS, make_schedule

STEPS = (1, 2, 4, 8, 9, 20, 50, 138, 139, MAX_STEPS)


class FlowSampling:
    """ComfyUI's ``ModelSamplingDiscreteFlow`` with multiplier 1, in torch."""

    def __init__(self, shift: float) -> None:
        import torch

        self.shift = shift
        self.sigmas = self.sigma(torch.arange(1, 1001, 1) / 1000)

    def sigma(self, timestep: Any) -> Any:
        return self.shift * timestep / (1 + (self.shift - 1) * timestep)


def simple(sampling: FlowSampling, steps: int) -> list[float]:
    stride = len(sampling.sigmas) / steps
    return [float(sampling.sigmas[-(1 + int(x * stride))]) for x in range(steps)]


def sgm_uniform(sampling: FlowSampling, steps: int) -> list[float]:
    import torch

    start, end = sampling.sigmas[-1], sampling.sigmas[0]  # a timestep is its sigma
    return [float(sampling.sigma(t)) for t in torch.linspace(float(start), float(end), steps + 1)[:-1]]


def beta(sampling: FlowSampling, steps: int) -> list[float]:
    import mpmath

    total = len(sampling.sigmas) - 1

    def quantile(probability: float) -> float:
        if probability == 1:
            return 1.0

        def excess(x: float) -> Any:
            return mpmath.betainc(0.6, 0.6, 0, x, regularized=True) - probability

        return float(mpmath.findroot(excess, (1e-12, 1 - 1e-12), solver="anderson", tol=1e-20))

    sigmas, last = [], -1
    for probability in 1 - np.linspace(0, 1, steps, endpoint=False):
        index = int(np.rint(quantile(float(probability)) * total))
        if index != last:
            sigmas.append(float(sampling.sigmas[index]))
        last = index
    return sigmas


@pytest.mark.deep
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize(("name", "comfy"), [("simple", simple), ("sgm_uniform", sgm_uniform)])
def test_schedules_are_comfyuis(name: str, comfy: Any, shift: float) -> None:
    for steps in STEPS:
        found = make_schedule(steps, SchedulerConfig(shift=shift, num_train_timesteps=1000), SchedulerName(name))
        expected = [*comfy(FlowSampling(shift), steps), 0.0]
        np.testing.assert_allclose(found.sigmas, expected, rtol=0, atol=3e-7)
        np.testing.assert_allclose(found.timesteps, 1 - found.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.deep
@pytest.mark.parametrize("steps", [1, 2, 8, 20, 50, 139])
def test_the_beta_schedule_is_comfyuis(steps: int) -> None:
    found = make_schedule(steps, SchedulerConfig(shift=3.0, num_train_timesteps=1000), SchedulerName.BETA)
    np.testing.assert_allclose(found.sigmas, [*beta(FlowSampling(3.0), steps), 0.0], rtol=0, atol=3e-7)


@pytest.mark.parametrize("shape", [0.6, 1.0, 0.5])
def test_quantiles_of_the_beta_distribution(shape: float) -> None:
    probabilities = np.array([0.0, 1e-6, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0])
    found = beta_quantiles(probabilities, shape)
    exact = {1.0: probabilities, 0.5: np.sin(np.pi / 2 * probabilities) ** 2}  # uniform, and the arcsine distribution
    if shape in exact:
        np.testing.assert_allclose(found, exact[shape], rtol=1e-9, atol=1e-15)
    else:  # as scipy.stats.beta.ppf gives them
        expected = [1.8558824624053e-10, 0.03958440558878, 0.17568037865269, 0.5, 0.82431962134731, 0.99998144126148]
        np.testing.assert_allclose(found[1:-1], expected, rtol=1e-8)
    np.testing.assert_allclose(found + beta_quantiles(1 - probabilities, shape), 1, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SchedulerName)
def test_schedules_descend_from_1_to_0(name: SchedulerName) -> None:
    for steps in STEPS:
        schedule = make_schedule(steps, SchedulerConfig(shift=3.0, num_train_timesteps=1000), name)
        assert schedule.sigmas[0] == 1
        assert schedule.sigmas[-1] == 0
        assert (np.diff(schedule.sigmas) < 0).all()
        assert schedule.steps == steps or (name is SchedulerName.BETA and 100 < schedule.steps < steps)


@pytest.mark.parametrize("name", SchedulerName)
def test_a_shift_replaces_the_models_own(name: SchedulerName) -> None:
    turbo, base = (SchedulerConfig(shift=shift, num_train_timesteps=1000) for shift in (3.0, 6.0))
    np.testing.assert_array_equal(make_schedule(8, turbo, name, 6.0).sigmas, make_schedule(8, base, name).sigmas)
    assert make_schedule(8, turbo, name, 6.0).sigmas[4] > make_schedule(8, turbo, name).sigmas[4]


@pytest.mark.parametrize("shift", [0, -1.0, math.inf, math.nan, True, "3"])
def test_impossible_shifts_are_refused(shift: Any) -> None:
    with pytest.raises(RequestError, match="shift"):
        Request("x", shift=shift)


@pytest.mark.parametrize("wrong", [{"sampler": "ddim"}, {"scheduler": "karras"}, {"sampler": None}], ids=str)
def test_unknown_names_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Request("x", **wrong)
