"""Step counts and sizes: what comes of the good ones, and what is said of the others."""

import numpy as np
import pytest
from facts import raises_with

from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.errors import RequestError
from zimage_runtime.model.config import SchedulerConfig
from zimage_runtime.model.geometry import caption_positions, image_geometry, image_positions, padded
from zimage_runtime.model.noise import MAX_SEED, TorchGenerator
from zimage_runtime.model.schedule import MAX_STEPS, make_schedule

TURBO = SchedulerConfig(shift=3.0, num_train_timesteps=1000)


@pytest.mark.parametrize("steps", [1, 2, 8, MAX_STEPS])
def test_a_schedule_runs_from_noise_to_the_image(steps: int) -> None:
    schedule = make_schedule(steps, TURBO)
    assert schedule.steps == steps
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == np.float32
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1] == 0
    assert (np.diff(schedule.sigmas) < 0).all()
    assert sum(float(schedule.step_size(i)) for i in range(steps)) == pytest.approx(-1, abs=1e-5)
    np.testing.assert_allclose(schedule.timesteps, 1 - schedule.sigmas[:-1], atol=1e-6)


def test_the_eight_sigmas_of_turbo() -> None:
    """3s / (1 + 2s) of 1, 7/8, …, 1/8: worked out by hand, as fractions."""
    expected = [1, 21 / 22, 18 / 20, 15 / 18, 12 / 16, 9 / 14, 6 / 12, 3 / 10, 0]
    np.testing.assert_allclose(make_schedule(8, TURBO).sigmas, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", [0, -1, MAX_STEPS + 1])
def test_impossible_step_counts(steps: int) -> None:
    with raises_with(RequestError, "steps", MAX_STEPS, steps):
        make_schedule(steps, TURBO)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 32), (31, 32), (32, 32), (33, 64), (512, 512)])
def test_padding(tokens: int, expected: int) -> None:
    assert padded(tokens) == expected


def test_an_image_in_latents_and_tokens() -> None:
    geometry = image_geometry(112, 80, SMALL.config)
    assert (geometry.latent_width, geometry.latent_height) == (14, 10)
    assert (geometry.columns, geometry.rows) == (7, 5)
    assert geometry.image_tokens == 64


def test_positions_of_a_small_image() -> None:
    geometry = image_geometry(48, 32, SMALL.config)
    positions = image_positions(geometry, 64)
    expected = [(65, 0, 0), (65, 0, 1), (65, 0, 2), (65, 1, 0), (65, 1, 1), (65, 1, 2)]
    assert positions.tolist() == [*map(list, expected), *[[0, 0, 0]] * 26]
    assert caption_positions(64).tolist() == [[1 + i, 0, 0] for i in range(64)]


@pytest.mark.parametrize(
    ("size", "facts"),
    [
        ((100, 64), ("width", 100, "try 96")),
        ((64, 0), ("height", 0, "try 16")),
        ((-64, 64), ("width", -64, "try 16")),
        ((8208, 64), ("width", 8208, 8192)),
        ((64, 8208), ("height", 8208, 8192)),
    ],
)
def test_sizes_that_the_model_cannot_generate(size: tuple[int, int], facts: tuple[object, ...]) -> None:
    with raises_with(RequestError, *facts):
        image_geometry(*size, SMALL.config)


def test_the_longest_side() -> None:
    assert image_geometry(8192, 16, SMALL.config).columns == 512


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_torch_would_not_take(seed: int) -> None:
    with raises_with(RequestError, "seed", MAX_SEED, seed):
        TorchGenerator(seed)


def test_too_little_noise_is_refused() -> None:
    with raises_with(RequestError, "noise", 15, 16):
        TorchGenerator(0).normals((3, 5))
