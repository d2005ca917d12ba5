"""Rebalancing: every fold is exact, a wrong one does not pass the gate, and outliers cost less with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_tools import with_loud_channels
from facts import raises_with
from linear_inputs import rows_read
from parity import Case, Drawing, check_parity, draw, draw_with_diffusers, relative_error

import zimage_export.weights.rebalance as rebalance
from zimage_export.build import BuildOptions, build
from zimage_export.measure.calibrate import measure_peaks
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.storage.precision import StoragePolicy
from zimage_export.weights.folding import ActivationRange
from zimage_export.weights.rebalance import Rebalancing, choose
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.precision import Precision
from zimage_runtime.bundle.rebalancing import PLACES, Factors, SharedHeads
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

CASE = Case("a red fox in the snow", (80, 112), 4, 3)
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def expected(diffusers_pipeline: Any) -> Drawing:
    return draw_with_diffusers(diffusers_pipeline, CASE)


def random_factors(monkeypatch: pytest.MonkeyPatch, only: int | None) -> None:
    """fp32 bundles are rebalanced, by factors from 1/30 to 30: at one of the four places of a block, or at all."""
    calls = iter(range(10**9))
    rng = np.random.default_rng(0)

    def factors(activations: ActivationRange, readers: Any) -> FloatArray:
        place = next(calls) % 4
        chosen = (
            np.exp(rng.uniform(-3.4, 3.4, len(activations.rms)))
            if only in (None, place)
            else np.ones(len(activations.rms))
        )
        return chosen.astype(np.float32)

    monkeypatch.setattr(rebalance, "choose", factors)
    monkeypatch.setattr(StoragePolicy, "rebalanced", True)


def rebuilt(checkpoint: Path, out: Path) -> Drawing:
    build(checkpoint, out, BuildOptions(), QUIET)
    return draw(Pipeline.from_bundle(out), CASE)[0]


@pytest.mark.parametrize("place", range(4))
def test_each_fold_is_exact(
    place: int, checkpoint: Path, expected: Drawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_factors(monkeypatch, place)
    found = rebuilt(checkpoint, tmp_path / "bundle")
    check_parity(found, expected)
    assert relative_error(found.latents, expected.latents) < 2e-5  # the fp32 bundle itself is 5e-6 off


WRONG = {
    "a norm's weight that is not divided": (0, "maker"),
    "rows of to_v that are not divided": (1, "maker"),
    "another norm's weight that is not divided": (2, "maker"),
    "rows of w3 that are not divided": (3, "maker"),
    "columns that are not multiplied": (3, "readers"),
    "one of three readers forgotten": (0, "last reader"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_fold_is_caught(
    what: str, checkpoint: Path, expected: Drawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, part = WRONG[what]
    random_factors(monkeypatch, place)
    right = Rebalancing._factors_of_block

    def wrong(self: Rebalancing, component: str, block: str) -> dict[str, Factors]:
        found = right(self, component, block)
        spot = PLACES[component][place]
        if part == "maker":
            vector = spot.maker not in {reader for p in PLACES[component] for reader in p.readers}
            found[spot.maker] = Factors() if vector else replace(found[spot.maker], rows=None)
        else:
            for reader in spot.readers if part == "readers" else spot.readers[-1:]:
                found[reader] = replace(found[reader], columns=None)
        return found

    monkeypatch.setattr(Rebalancing, "_factors_of_block", wrong)
    with raises_with(AssertionError, "latents", "diffusers"):
        check_parity(rebuilt(checkpoint, tmp_path / "bundle"), expected)


def test_shared_values_must_be_scaled_alike(
    checkpoint: Path, expected: Drawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two query heads read each value head of the text encoder, and which two matters."""
    random_factors(monkeypatch, 1)
    monkeypatch.setattr(SharedHeads, "repeat", lambda self, values: np.tile(values, self.groups))
    with raises_with(AssertionError, "latents", "diffusers"):
        check_parity(rebuilt(checkpoint, tmp_path / "bundle"), expected)


@pytest.fixture(scope="module")
def loud(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_loud_channels(checkpoint, tmp_path_factory.mktemp("outliers") / "checkpoint")


class Untouched(Rebalancing):
    """What an export without rebalancing would do."""

    def _factors_of_block(self, component: str, block: str) -> dict[str, Factors]:
        return {name: Factors() for p in PLACES[component] for name in (p.maker, *p.readers)}


def test_outliers_cost_an_eighth_with_rebalancing(
    loud: Path, expected: Drawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(name: str, options: BuildOptions) -> float:
        build(loud, tmp_path / name, options, QUIET)
        return relative_error(draw(Pipeline.from_bundle(tmp_path / name), CASE)[0].latents, expected.latents)

    assert error("fp32", BuildOptions()) < 1e-4  # the planted model is the same model
    balanced = error("balanced", BuildOptions(Precision.INT8))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n", encoding="utf-8")
    calibrated = error("calibrated", BuildOptions(Precision.INT8, calibrate=prompts))
    monkeypatch.setattr("zimage_export.build.Rebalancing", Untouched)
    plain = error("plain", BuildOptions(Precision.INT8))
    assert balanced < plain / 8
    assert calibrated < plain / 8


def test_calibration_hears_what_the_linears_read(checkpoint: Path, diffusers_pipeline: Any) -> None:
    """Against a hook of the test's own in diffusers' model, over the same image."""
    peaks = measure_peaks(Checkpoint.open(checkpoint), ["a red fox"], QUIET)["transformer"]
    side = Checkpoint.open(checkpoint).config.vae.sample_size
    linear = diffusers_pipeline.transformer.layers[1].feed_forward.w2
    rows = rows_read(diffusers_pipeline, linear, "a red fox", side)
    heard = peaks["layers.1"].places["feed_forward.w2.weight"]
    np.testing.assert_allclose(heard.peak, np.abs(rows).max(axis=0), rtol=1e-4)
    np.testing.assert_allclose(heard.rms, np.sqrt(np.mean(rows**2, axis=0)), rtol=1e-4)


def test_factors_follow_what_is_loud() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, 256)).astype(np.float32)
    even = np.ones(256, np.float32)
    assert np.ptp(choose(ActivationRange(even, 4 * even), [np.sign(rows)])) == 0  # nothing to gain
    loud = even.copy()
    loud[7] = 50
    factors = choose(ActivationRange(loud, 4 * loud), [rows])
    assert factors[7] > 5 * np.delete(factors, 7).max()
    assert np.isfinite(choose(ActivationRange(0 * even, 0 * even), [0 * rows])).all()
