"""Turbo or Base: what says it, what is recorded, and what fp16 does with activations that it cannot hold."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_tools import altered_copy
from cli_tools import Capture, assert_one_line_error, call_export
from facts import raises_with
from numpy.typing import NDArray
from safetensors.torch import save_file
from single_file_tools import Tensors, to_comfy_transformer

from zimage_export.errors import CheckpointError, ExportError
from zimage_export.measure import verify
from zimage_export.source.checkpoint import Checkpoint, OpenOptions
from zimage_export.source.single_files import SingleFiles
from zimage_export.source.variant import Variant, said_by_metadata, said_by_name
from zimage_export.storage.folds import BlockFold
from zimage_export.weights.folding import ActivationRange, BlockPeak, check_fp16_range
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.job import Job

pytestmark = pytest.mark.deep

TURBO, BASE = Variant.TURBO, Variant.BASE


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("z_image_turbo_bf16", TURBO),
        ("z_image_turbo_int8_convrot", TURBO),
        ("Z-Image-Turbo-Q4_K_M", TURBO),
        ("z-image-turbo_fp8_scaled_e4m3fn", TURBO),
        ("z_image_bf16", BASE),
        ("z_image_fp8_scaled", BASE),
        ("Z-Image-Q8_0", BASE),
        ("z_image_int8_convrot", BASE),
        ("z-image-base-my-finetune", BASE),
        ("z_image_de_turbo_v1_bf16", None),
        ("z_image_portrait_v3", None),
        ("turbocharged_bf16", None),
        ("my_finetune", None),
        ("z_image_base_turbo_merge", None),
    ],
)
def test_names(name: str, variant: Variant | None) -> None:
    assert [said.variant for said in said_by_name(name, "file name")] == ([variant] if variant else [])


def test_metadata() -> None:
    assert [s.variant for s in said_by_metadata({"modelspec.title": "Z-Image Turbo"})] == [TURBO]
    assert [s.variant for s in said_by_metadata({"modelspec.architecture": "z-image-base", "a": "turbo"})] == [BASE]
    assert said_by_metadata({"modelspec.architecture": "Z-Image", "modelspec.title": "De-Turbo"}) == []


@pytest.fixture
def base(single_files_model: Path, tmp_path: Path) -> Path:
    """The checkpoint with Base's scheduler."""
    copy = tmp_path / "z-image"
    shutil.copytree(single_files_model, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 6.0}))
    return copy


@pytest.fixture
def files(stored: dict[str, Tensors], tmp_path: Path) -> dict[str, SingleFiles]:
    """The same transformer under three names, and with metadata."""
    tensors = to_comfy_transformer(stored["transformer"])
    found = {}
    for name, metadata in (
        ("z_image_turbo_bf16", None),
        ("z_image_bf16", None),
        ("mine", None),
        ("titled", {"modelspec.title": "Z-Image-Base"}),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
        found[name] = SingleFiles(transformer=tmp_path / f"{name}.safetensors")
    return found


def test_a_folder_says_it_by_its_scheduler(base: Path, single_files_model: Path) -> None:
    assert Checkpoint.open(base).variant.variant is BASE
    assert Checkpoint.open(single_files_model).variant.variant is TURBO
    given = Checkpoint.open(base, options=OpenOptions(TURBO))
    assert (given.variant.variant, given.config.scheduler.shift) == (TURBO, 3.0)


def test_a_file_that_does_not_say_it_is_the_folders(
    base: Path, single_files_model: Path, files: dict[str, SingleFiles]
) -> None:
    for folder, variant in ((base, BASE), (single_files_model, TURBO)):
        decision = Checkpoint.open(folder, files["mine"]).variant
        assert decision.variant is variant
        assert decision.note
        assert variant.value in decision.note
    assert Checkpoint.open(base, files["z_image_bf16"]).variant.note is None
    assert Checkpoint.open(base, files["titled"]).variant.variant is BASE


@pytest.mark.parametrize("name", ["z_image_bf16", "titled"])
def test_contradictions_stop_the_build(name: str, single_files_model: Path, files: dict[str, SingleFiles]) -> None:
    given = files[name]
    with raises_with(CheckpointError, given.transformer, "turbo", "base", "3.0", "--variant"):
        Checkpoint.open(single_files_model, given)
    opened = Checkpoint.open(single_files_model, given, OpenOptions(BASE))
    assert (opened.variant.variant, opened.config.scheduler.shift) == (BASE, 6.0)
    assert Checkpoint.open(single_files_model, given, OpenOptions(TURBO)).config.scheduler.shift == 3.0


def test_files_alone_have_their_variants_schedule(wide: SingleFiles, tmp_path: Path, qwen_tokenizer: Path) -> None:
    for name, shift, note in (("z_image_bf16", 6.0, False), ("z_image_turbo_bf16", 3.0, False), ("mine", 3.0, True)):
        path = tmp_path / f"{name}.safetensors"
        path.symlink_to(wide.transformer)  # type: ignore[arg-type]
        three = SingleFiles(path, wide.text_encoder, wide.vae)
        opened = Checkpoint.open(qwen_tokenizer, three, OpenOptions(allow_pruned=True))
        assert (opened.config.scheduler.shift, opened.variant.note is not None) == (shift, note)


def test_base_is_recorded_with_its_defaults_and_verified_with_fewer_steps(
    base: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert call_export(capsys, "build", base, out, "--quiet").status == 0
    manifest = Bundle.open(out).manifest
    assert manifest.variant == "base"
    assert (manifest.defaults.steps, manifest.defaults.cfg_scale) == (50, 5.0)
    assert manifest.config.scheduler.shift == 6.0

    jobs: list[Job] = []

    def measure(pipeline: Any, reference: Any, checkpoint: Any, job: Job, advance: Any) -> dict[str, float]:
        jobs.append(job)
        return dict.fromkeys(("text_encoder", "caption", "modulation", "denoiser", "decoder", "latents"), 1e-7) | {
            "max_difference": 0.0,
            "mean_square": 0.0,
        }

    monkeypatch.setattr(verify, "_measure", measure)
    verify.verify_reported(Bundle.open(out), base, Progress(quiet=True), prompts=["a fox"])
    assert [(job.schedule.steps, job.info.cfg_scale) for job in jobs] == [(8, 1.0)]


# --- fp16 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Ten times faster at this size, where threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _peak(attention: float = 1, product: float = 1, ffn: float = 1, read: float = 1) -> BlockPeak:
    peak = BlockPeak()
    peak.attention, peak.product, peak.ffn = attention, product, ffn
    width = np.ones(4, np.float32)
    peak.places = {
        name: ActivationRange(width, width * np.float32(read))
        for name in ("attention.to_q.weight", "feed_forward.w1.weight")
    }
    return peak


@pytest.mark.parametrize(
    ("peak", "fold", "fits"),
    [
        (_peak(), BlockFold(), True),
        (_peak(product=2e6, ffn=3e6), BlockFold(ffn=6, product=4), True),
        (_peak(product=2e11), BlockFold(ffn=6, product=12), False),
        (_peak(attention=1e5), BlockFold(attention=4), True),
        (_peak(attention=1e8), BlockFold(attention=14), False),
        (_peak(read=4e4), BlockFold(), False),
    ],
)
def test_what_fp16_can_hold(peak: BlockPeak, fold: BlockFold, fits: bool) -> None:
    peaks, folds = {"transformer": {"layers.1": peak}}, {"transformer": {"layers.1": fold}}
    if fits:
        check_fp16_range(peaks, folds)
        return
    with raises_with(ExportError, "transformer", "layers.1", 65504, "--precision bf16"):
        check_fp16_range(peaks, folds)


@pytest.mark.usefixtures("one_thread")
def test_base_in_fp16_is_measured_and_refused_beyond_its_range(base: Path, tmp_path: Path, capsys: Capture) -> None:
    """A norm's weight so large that what the next linear reads exceeds fp16's range, as in some trained models."""

    def loud(name: str, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        return values * 3e4 if name == "layers.1.ffn_norm1.weight" else None

    altered = altered_copy(base, tmp_path / "loud", "transformer", loud)
    outcome = call_export(capsys, "build", altered, tmp_path / "out", "--precision", "fp16", "--quiet")
    assert_one_line_error(outcome, "transformer", "layers.1", "fp16", "--precision bf16")
    assert not (tmp_path / "out").exists()
    as_turbo = call_export(
        capsys, "build", altered, tmp_path / "out", "--precision", "fp16", "--variant", "turbo", "--quiet"
    )
    assert as_turbo.status == 0  # which is not measured unless --calibrate asks for it
