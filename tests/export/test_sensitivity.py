"""The sensitivity report: what it measures, against what ONNX Runtime's own programs do, and where it is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import call_export

from zimage_export.measure.sensitivity import BF16, INT4, INT8, INT8_OF_7, PRECISIONS, _squares
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.machine.int8_products import activation_bits

pytestmark = pytest.mark.deep


def errors(x: Any, weights: Any, columns: Any = None) -> dict[str, float]:
    found = _squares(x.astype(np.float32), weights.astype(np.float32), columns)
    return {precision: float(np.sqrt(error / whole)) for precision, (error, whole) in found.items()}


def test_errors_are_those_of_rounding() -> None:
    """For normal values each error is what steps of a known size give: step² / 12 a value."""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((64, 1024)), rng.standard_normal((128, 1024))
    found = errors(x, weights)
    assert list(found) == list(PRECISIONS)
    steps = [np.abs(side).max(axis=1).mean() / 127 for side in (x, weights)]
    both = np.sqrt(sum(step**2 / 12 for step in steps))
    assert found[INT8] == pytest.approx(both, rel=0.1)
    assert found[INT8_OF_7] == pytest.approx(
        np.sqrt(steps[0] ** 2 * (127 / 63) ** 2 / 12 + steps[1] ** 2 / 12), rel=0.1
    )
    assert found[BF16] == pytest.approx(2**-7 / np.sqrt(12) * 0.72, rel=0.1)  # steps of 2⁻⁷ below 2
    assert 0.06 < found[INT4] < 0.11


def test_rebalancing_is_counted() -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((64, 1024)), rng.standard_normal((128, 1024))
    even = errors(x, weights)[INT8]
    loud = np.where(np.arange(1024) % 128 == 0, 50.0, 1.0).astype(np.float32)
    assert errors(x * loud, weights / loud)[INT8] > 5 * even
    assert errors(x * loud, weights / loud, loud)[INT8] == pytest.approx(even, rel=0.05)


def test_verify_tells_every_layer_and_keeps_the_summary(
    checkpoint: Path,
    bundle_in: Callable[[Precision], Path],
    diffusers_pipeline: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = Bundle.open(shutil.copytree(bundle_in(Precision.INT8), tmp_path / "int8"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n一只猫\n", encoding="utf-8")
    options = ["--reference", checkpoint, "--prompts", prompts, "--size", "64x64", "--quiet"]
    outcome = call_export(capsys, "verify", bundle.root, *options, "--json")
    assert outcome.status == 0, outcome.err
    document = json.loads(outcome.out)
    layers = document["each_layer"]
    assert len(layers["transformer"]) == 7 * 7
    assert len(layers["text_encoder"]) == 7 * 3
    for by_name in layers.values():
        for found in by_name.values():
            assert 0 < found[BF16] < found[INT8] < found[INT8_OF_7] < found[INT4] < 0.3
    parity = dict(Bundle.open(bundle.root).manifest.parity or {})
    assert parity["prompts"] == 3 == len(parity["picture"]["psnr_db_each"])
    assert parity["picture"]["psnr_db"] == min(parity["picture"]["psnr_db_each"])
    assert parity["latents_median"] <= parity["latents"]
    assert parity["activation_bits"] == activation_bits()
    worst = parity["layers"]["transformer"][INT8]
    assert worst["worst"] == pytest.approx(layers["transformer"][worst["layer"]][INT8], rel=0.01)
    assert 0 < worst["median"] <= worst["worst"]
    # a component's error is made of its layers', and no fraction of them
    assert parity["relative_error"]["denoiser"] > 0.3 * worst["median"]
