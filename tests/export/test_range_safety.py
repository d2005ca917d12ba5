"""fp16's range: a model like the published one, whose activations leave it, with and without the folds.

The CUDA program in fp16 runs on the CPU provider, which rounds every operator's result to fp16: what is above
65504 becomes infinite there just as it does on a GPU.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from checkpoint_tools import altered_copy
from half_emulation import run_cuda_program_on_cpu
from numpy.typing import NDArray
from parity import relative_error

import zimage_export.build
from zimage_export.build import BuildOptions, build
from zimage_export.graphs.layers import Layers
from zimage_export.measure.calibrate import measure_peaks
from zimage_export.measure.self_check import fixed_inputs
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.weights.folding import FP16_MAX, BlockPeak, choose_folds
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.geometry import caption_positions, image_geometry, image_positions, transformer_rotary
from zimage_runtime.model.programs import Program

pytestmark = pytest.mark.deep

FP16_GATE = 3e-3
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def loud_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose out-projections and SwiGLU products pass 65504; in float32 it gives the original's image."""

    def louder(name: str, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        if name.startswith("layers.1.") and name.endswith(("attention.to_out.0.weight", "feed_forward.w3.weight")):
            return values * np.float32(2**16)
        return None

    return altered_copy(checkpoint, tmp_path_factory.mktemp("loud") / "checkpoint", "transformer", louder)


@pytest.fixture(scope="module")
def loud_bundles(loud_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """It in fp32, in fp16 with the folds, and in fp16 as one would without knowing of them."""
    folder = tmp_path_factory.mktemp("loud-bundles")
    found = {
        "fp32": build(loud_checkpoint, folder / "fp32", BuildOptions(Precision.FP32), QUIET),
        "folded": build(loud_checkpoint, folder / "folded", BuildOptions(Precision.FP16), QUIET),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zimage_export.build, "choose_folds", lambda checkpoint, peaks=None: {})
        found["plain"] = build(loud_checkpoint, folder / "plain", BuildOptions(Precision.FP16), QUIET)
    return found


def denoiser_inputs(bundle: Bundle, side: int) -> dict[str, FloatArray]:
    """A denoiser call at the token count of a `side` x `side` image."""
    config = bundle.manifest.config
    feeds = dict(fixed_inputs(config)[Program.DENOISER])
    geometry = image_geometry(side, side, config)
    rng = np.random.default_rng(1)
    feeds["latents"] = rng.standard_normal((1, 16, geometry.latent_height, geometry.latent_width), dtype=np.float32)
    image = transformer_rotary(image_positions(geometry, 32), config.transformer)
    caption = transformer_rotary(caption_positions(32), config.transformer)
    feeds |= {"image_cos": image.cos, "image_sin": image.sin, "caption_cos": caption.cos, "caption_sin": caption.sin}
    table = HostPrograms(bundle).run(Program.MODULATION, {"timesteps": np.array([0.3], np.float32)})
    return feeds | {"modulation": table["modulation"][0], "final_scale": table["final_scale"][0]}


@pytest.mark.parametrize("side", [512, 1024])
def test_fp16_overflows_without_folds_and_matches_with_them(loud_bundles: dict[str, Bundle], side: int) -> None:
    feeds = denoiser_inputs(loud_bundles["fp32"], side)
    expected = HostPrograms(loud_bundles["fp32"]).run(Program.DENOISER, feeds)["velocity"]
    plain = run_cuda_program_on_cpu(loud_bundles["plain"], Program.DENOISER, feeds)["velocity"]
    folded = run_cuda_program_on_cpu(loud_bundles["folded"], Program.DENOISER, feeds)["velocity"]
    assert np.isfinite(expected).all()
    assert np.isnan(plain).any()
    assert relative_error(folded, expected) < FP16_GATE


def test_folds_change_nothing_in_float32(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded = Bundle.open(bundle)
    monkeypatch.setattr(zimage_export.build, "choose_folds", lambda checkpoint, peaks=None: {})
    plain = build(checkpoint, tmp_path / "plain", BuildOptions(), QUIET)
    assert plain.manifest.fingerprint != folded.manifest.fingerprint
    for program, feeds in fixed_inputs(folded.manifest.config).items():
        expected = HostPrograms(plain).run(program, feeds)
        for name, value in HostPrograms(folded).run(program, feeds).items():
            assert relative_error(value, expected[name]) < 1e-6, (program, name)


def test_a_fold_without_its_epsilon_is_caught(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: Layers, x: str, scale: str, epsilon: float, exponent: int, name: str) -> str:
        return self.rms_norm(x, scale, epsilon, name)

    monkeypatch.setattr(Layers, "branch_norm", forgetful)
    wrong = build(checkpoint, tmp_path / "wrong", BuildOptions(), QUIET)
    right = Bundle.open(bundle)
    feeds = fixed_inputs(right.manifest.config)[Program.DENOISER]
    expected = HostPrograms(right).run(Program.DENOISER, feeds)["velocity"]
    assert relative_error(HostPrograms(wrong).run(Program.DENOISER, feeds)["velocity"], expected) > 1e-4


def test_calibration_sees_what_overflows(loud_checkpoint: Path) -> None:
    opened = Checkpoint.open(loud_checkpoint)
    peaks = measure_peaks(opened, ["a red circle"], QUIET)["transformer"]
    loud = peaks["layers.1"]
    assert min(loud.attention, loud.product) > FP16_MAX
    assert max(peaks["layers.0"].attention, peaks["layers.0"].product) < FP16_MAX


def test_measured_peaks_choose_what_is_missing(loud_checkpoint: Path) -> None:
    opened = Checkpoint.open(loud_checkpoint)
    peak = BlockPeak()
    peak.attention, peak.product, peak.ffn = FP16_MAX * 2**5, FP16_MAX * 2**7, FP16_MAX
    folds = choose_folds(opened, {"transformer": {"layers.1": peak}})["transformer"]
    headroom = math.log2(8)
    assert folds["layers.1"].attention == 5 + headroom
    assert folds["layers.1"].ffn + folds["layers.1"].product == 7 + headroom
    assert folds["layers.0"] == choose_folds(opened)["transformer"]["layers.0"]


def test_calibrated_export_is_exact_in_float32(
    loud_checkpoint: Path, loud_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# one prompt a line\na red circle\n\n", encoding="utf-8")
    calibrated = build(loud_checkpoint, tmp_path / "fp32", BuildOptions(calibrate=prompts), QUIET)
    folds = calibrated.manifest.folds["transformer"]["layers.1"]
    assert folds["ffn"] + folds["product"] > 6
    feeds = fixed_inputs(calibrated.manifest.config)[Program.DENOISER]
    expected = HostPrograms(loud_bundles["fp32"]).run(Program.DENOISER, feeds)["velocity"]
    assert relative_error(HostPrograms(calibrated).run(Program.DENOISER, feeds)["velocity"], expected) < 1e-6
