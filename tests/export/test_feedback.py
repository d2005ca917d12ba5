"""Error feedback: integers are those of the closed form, outputs lose less, and calibration measures what it needs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_tools import with_loud_channels
from linear_inputs import rows_read
from numpy.typing import NDArray
from parity import Case, draw, draw_with_diffusers, relative_error

from zimage_export.build import BuildOptions, build
from zimage_export.measure.calibrate import measure_peaks
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.storage.feedback import GROUP, Feedback, group_slices
from zimage_export.storage.quantize import blocks4
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.precision import Precision
from zimage_runtime.bundle.rebalancing import RebalancingFactors
from zimage_runtime.bundle.stored_weights import dequantized
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.pipeline import Pipeline

QUIET = Progress(quiet=True)
WIDTH = GROUP + 64
"""A whole group and a smaller one."""


@pytest.fixture(scope="module")
def inputs() -> FloatArray:
    """Tokens whose channels vary together, of different magnitudes."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((4000, WIDTH)) @ (np.eye(WIDTH) + 0.2 * rng.standard_normal((WIDTH, WIDTH)))
    return np.asarray(mixed * np.exp(rng.uniform(-1, 1, WIDTH)), np.float32)


@pytest.fixture(scope="module")
def weights() -> FloatArray:
    return np.random.default_rng(1).standard_normal((48, WIDTH)).astype(np.float32)


def moments_of(rows: FloatArray) -> list[FloatArray]:
    return [rows[:, own].T @ rows[:, own] / np.float32(len(rows)) for own in group_slices(rows.shape[1])]


def in_turn(weights: FloatArray, moment: NDArray[np.float64], step: NDArray[np.float64]) -> NDArray[np.float64]:
    """The definition: after each rounding, the rest moves to where the output's error is least."""
    order = np.argsort(-np.diag(moment), kind="stable")
    moment = moment[np.ix_(order, order)] + 0.01 * np.mean(np.diag(moment)) * np.eye(len(moment))
    left, found = weights[:, order].astype(np.float64), np.empty(weights.shape)
    for index in range(len(moment)):
        steps = step[:, order[index]]
        found[:, order[index]] = np.clip(np.rint(left[:, index] / steps), -8, 7)
        error = found[:, order[index]] * steps - left[:, index]
        rest = slice(index + 1, None)
        left[:, rest] -= np.outer(error, np.linalg.solve(moment[rest, rest], moment[rest, index]))
    return found


def test_integers_are_the_closed_forms(inputs: FloatArray, weights: FloatArray) -> None:
    moments = moments_of(inputs)
    packed, scales = blocks4(weights, Feedback.of(moments))
    steps = np.repeat(scales.astype(np.float64), 32, axis=1)
    found = dequantized(packed, scales) / steps
    for own, moment in zip(group_slices(WIDTH), moments, strict=True):
        expected = in_turn(weights[:, own], moment.astype(np.float64), steps[:, own])
        # float32 may round a tie the other way, and with it what follows
        assert np.mean(np.abs(found[:, own] - expected) > 0.5) < 0.01


def test_outputs_lose_less(inputs: FloatArray, weights: FloatArray) -> None:
    plain, fed = blocks4(weights), blocks4(weights, Feedback.of(moments_of(inputs)))
    before, after = (np.linalg.norm(inputs @ (dequantized(*one) - weights).T) for one in (plain, fed))
    assert after < 0.9 * before
    np.testing.assert_array_equal(plain[1], fed[1])  # the scales


def test_factors_of_rebalancing_are_those_of_the_inputs(inputs: FloatArray, weights: FloatArray) -> None:
    factors = np.exp2(np.random.default_rng(2).integers(-3, 4, WIDTH)).astype(np.float32)
    found, _ = blocks4(weights * factors, Feedback.of(moments_of(inputs), factors))
    expected, _ = blocks4(weights * factors, Feedback.of(moments_of(inputs / factors)))
    assert np.mean(found != expected) < 0.01


@pytest.mark.parametrize("moment", [0.0, 3.0], ids=["inputs that are zero", "inputs that are independent"])
def test_nothing_changes_where_nothing_can_be_made_up_for(moment: float, weights: FloatArray) -> None:
    feedback = Feedback.of([moment * np.eye(own.stop - own.start, dtype=np.float32) for own in group_slices(WIDTH)])
    # the last step without feedback refits the scales to the integers, and feedback rounds to the refitted ones
    fed, plain = (dequantized(*found) for found in (blocks4(weights, feedback), blocks4(weights)))
    assert np.mean(fed != plain) < 0.02
    assert np.linalg.norm(fed - weights) <= np.linalg.norm(plain - weights)


@pytest.mark.deep
def test_calibrated_int4_is_rebalanced(checkpoint: Path, diffusers_pipeline: Any, tmp_path: Path) -> None:
    """Loud channels cost it less, and what it multiplied the weights by is kept for a LoRA."""
    loud = with_loud_channels(checkpoint, tmp_path / "loud")
    case = Case("a red circle", (80, 64), 4, 3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a green square\n", encoding="utf-8")
    expected = draw_with_diffusers(diffusers_pipeline, case)

    def error(name: str, calibrate: Path | None) -> float:
        bundle = build(loud, tmp_path / name, BuildOptions(Precision.INT4, calibrate=calibrate), QUIET)
        columns = RebalancingFactors(bundle, "transformer").of("layers.0.attention.to_q.weight").columns
        assert (columns is not None and np.ptp(columns) > 0) == (calibrate is not None)
        return relative_error(draw(Pipeline.from_bundle(bundle.root), case)[0].latents, expected.latents)

    assert error("calibrated", prompts) < 0.7 * error("plain", None)


@pytest.mark.deep
def test_calibration_measures_how_channels_vary_together(checkpoint: Path, diffusers_pipeline: Any) -> None:
    """Against a hook of the test's own in diffusers' model, over the same image; not where nobody asks."""
    opened = Checkpoint.open(checkpoint)
    peaks = measure_peaks(opened, ["a red fox"], QUIET, moments=True)["transformer"]
    linear, side = diffusers_pipeline.transformer.layers[1].feed_forward.w3, opened.config.vae.sample_size
    rows = rows_read(diffusers_pipeline, linear, "a red fox", side)
    (found,) = peaks["layers.1"].places["feed_forward.w1.weight"].moments or ()
    assert relative_error(found, rows.T @ rows / len(rows)) < 1e-3


@pytest.mark.deep
def test_a_calibrated_bundle_is_nearer(
    checkpoint: Path, diffusers_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than one that is calibrated in the same way without feedback."""
    case = Case("a red circle", (80, 64), 4, 3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a green square\n白色背景\n", encoding="utf-8")
    options, expected = BuildOptions(Precision.INT4, calibrate=prompts), draw_with_diffusers(diffusers_pipeline, case)

    def error(name: str) -> float:
        build(checkpoint, tmp_path / name, options, QUIET)
        return relative_error(draw(Pipeline.from_bundle(tmp_path / name), case)[0].latents, expected.latents)

    fed = error("fed")
    monkeypatch.setattr("zimage_export.weights.streaming.measured_moments", lambda peaks, component, name: None)
    plain = error("plain")
    assert fed < 0.9 * plain
