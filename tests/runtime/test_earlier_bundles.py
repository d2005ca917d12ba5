"""Bundles that are on people's disks already: they open, generate and replay; programs are optional in the manifest."""

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_rt
from facts import raises_with
from PIL import Image

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, CUDA_WEIGHT_ONLY, FileRecord, Manifest, ProgramRecord
from zimage_runtime.errors import BundleError
from zimage_runtime.executors.ort.cpu_plan import plan_memory
from zimage_runtime.executors.protocol import Work
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.images.metadata import ImageInfo
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline

DATA = Path(__file__).parents[1] / "data"
PRECISIONS = ("fp16", "int8")
PSNR_INT8 = 50.0  # 7 and 8 bits, which processors differ in, are 58 dB apart
FINGERPRINTS = {
    "fp16": "0bce7b1bdf76c81cc748433f09aac412cc8178438de238789a55413316956f93",
    "int8": "e8e9ad2e7d5c5e0ffa94fca70501006b5fe2b3e9a19e6808097f259ebcef6335",
}


def image_of(precision: str) -> Path:
    """What the commit generated that wrote the bundle."""
    return DATA / f"bundle-9e9dc91-{precision}.png"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundles by precision; not to be written to."""
    root = tmp_path_factory.mktemp("earlier")
    for precision in PRECISIONS:
        zipfile.ZipFile(DATA / f"bundle-9e9dc91-{precision}.zip").extractall(root / precision)
    return {precision: root / precision for precision in PRECISIONS}


def edited(source: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The bundle with another manifest; its other files are linked."""
    out.mkdir()
    for path in source.iterdir():
        if path.name != "manifest.json":
            (out / path.name).symlink_to(path)
    document = json.loads((source / "manifest.json").read_text("utf-8"))
    edit(document)
    (out / "manifest.json").write_text(json.dumps(document), "utf-8")
    return out


def recorded(precision: str) -> ImageInfo:
    info = read_image_info(image_of(precision))
    assert info is not None
    return info


def check_image(root: Path, precision: str) -> None:
    """Generates the image again and compares it with what the bundle's own commit generated."""
    info = recorded(precision)
    size = (info.width, info.height)
    result = Pipeline.from_bundle(root, CPU).generate(info.prompt, size=size, steps=info.steps, seed=info.seed)
    with Image.open(image_of(precision)) as expected:
        difference = np.asarray(result.images[0], float) - np.asarray(expected.convert("RGB"), float)
    if precision == "int8":
        assert 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-9)) >= PSNR_INT8
    else:
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_opens_and_generates_what_it_did(bundles: dict[str, Path], precision: str) -> None:
    bundle = Bundle.open(bundles[precision])
    bundle.verify()
    assert bundle.manifest.executors == {CPU, CUDA}
    check_image(bundles[precision], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_its_manifest_is_written_back_without_a_change_of_meaning(bundles: dict[str, Path], precision: str) -> None:
    manifest = Bundle.open(bundles[precision]).manifest
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def without_encoder(document: dict[str, Any]) -> None:
    del document["programs"]["encoder"]


def test_a_bundle_that_was_made_before_a_program_existed_runs(
    bundles: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    root = edited(bundles["fp16"], tmp_path / "bundle", without_encoder)
    bundle = Bundle.open(root)
    assert Program.ENCODER not in bundle.manifest.programs
    assert bundle.manifest.record(Program.ENCODER, CPU) is None
    assert bundle.manifest.executors == {CPU, CUDA}
    check_image(root, "fp16")
    assert call_rt(capsys, "info", root).status == 0


def test_what_needs_an_optional_program_that_is_absent_says_so(
    bundles: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    root = edited(bundles["fp16"], tmp_path / "bundle", without_encoder)
    with raises_with(BundleError, root, "encoder", "'cpu'", "image", "export"):
        Bundle.open(root).program(Program.ENCODER, CPU)
    outcome = call_rt(
        capsys, "run", "a cat", "-m", root, "--image", image_of("fp16"), "-o", tmp_path / "a.png", "--quiet"
    )
    assert_one_line_error(outcome, root, "encoder", "image", "export")
    assert not (tmp_path / "a.png").exists()


def test_an_empty_entry_is_an_absent_program(bundles: dict[str, Path], tmp_path: Path) -> None:
    root = edited(bundles["fp16"], tmp_path / "bundle", lambda document: document["programs"].update(encoder={}))
    assert Program.ENCODER not in Bundle.open(root).manifest.programs


def test_programs_of_a_later_version_are_ignored(bundles: dict[str, Path], tmp_path: Path) -> None:
    record = {"cpu": {"path": "vae/decoder.cpu.onnx", "weight_bytes": 5}}
    root = edited(bundles["fp16"], tmp_path / "bundle", lambda d: d["programs"].update(control=record, other=[]))
    assert Bundle.open(root).manifest == Bundle.open(bundles["fp16"]).manifest


@pytest.mark.parametrize("program", ["text_encoder", "caption", "denoiser", "decoder"])
def test_an_executor_without_a_required_program_is_not_listed(
    bundles: dict[str, Path], tmp_path: Path, program: str
) -> None:
    root = edited(bundles["int8"], tmp_path / "bundle", lambda document: document["programs"][program].pop("cuda"))
    assert Bundle.open(root).manifest.executors == {CPU}


def test_no_executor_runs_without_modulation(bundles: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    root = edited(bundles["fp16"], tmp_path / "bundle", lambda document: document["programs"].pop("modulation"))
    assert Bundle.open(root).manifest.executors == set()
    assert re.search("^executors +none", call_rt(capsys, "info", root).out, re.M)


def plan_on_cpu(manifest: Manifest, *, encodes: bool) -> object:
    work = Work(geometry=image_geometry(96, 64, manifest.config), tokens=20, encodes=encodes)
    return plan_memory(manifest, work, available=1 << 40)


def test_another_executors_programs_change_neither_the_list_nor_the_plan(bundles: dict[str, Path]) -> None:
    manifest = Bundle.open(bundles["int8"]).manifest
    huge = ProgramRecord("vae/decoder.cpu.onnx", 1 << 45)
    programs = {program: {**records, "webgpu": huge, CUDA: huge} for program, records in manifest.programs.items()}
    programs[Program.DENOISER][CUDA_WEIGHT_ONLY] = huge
    del programs[Program.ENCODER]["webgpu"]
    other = dataclasses.replace(manifest, programs=programs)
    assert other.executors == {CPU, CUDA, "webgpu"}
    for encodes in (False, True):
        assert plan_on_cpu(other, encodes=encodes) == plan_on_cpu(manifest, encodes=encodes)


def test_the_second_denoiser_for_cuda_is_no_executor_whatever_it_has(bundles: dict[str, Path]) -> None:
    manifest = Bundle.open(bundles["int8"]).manifest
    programs = {p: {**records, CUDA_WEIGHT_ONLY: records[CPU]} for p, records in manifest.programs.items()}
    assert dataclasses.replace(manifest, programs=programs).executors == {CPU, CUDA}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_images_record_the_fingerprint_of_all_files_and_still_match(bundles: dict[str, Path], precision: str) -> None:
    """The image's metadata holds what the commit computed that wrote the bundle."""
    manifest = Bundle.open(bundles[precision]).manifest
    assert recorded(precision).fingerprint == manifest.files_fingerprint
    assert manifest.matches(recorded(precision).fingerprint)
    assert manifest.matches(manifest.fingerprint)
    (other,) = set(PRECISIONS) - {precision}
    assert not manifest.matches(recorded(other).fingerprint)
    assert not manifest.matches(FINGERPRINTS[other])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_fingerprint_of_weights_stays_from_version_to_version(bundles: dict[str, Path], precision: str) -> None:
    """A key that the configuration gains later must not be hashed where it has its default."""
    assert Bundle.open(bundles[precision]).manifest.fingerprint == FINGERPRINTS[precision]


def test_images_match_after_the_programs_were_replaced_twice(bundles: dict[str, Path]) -> None:
    first = Bundle.open(bundles["fp16"]).manifest
    renewed = first
    for digit in "ab":
        files = {**renewed.files, "vae/decoder.cpu.onnx": FileRecord(1, digit * 64)}
        replaced = renewed.with_programs(renewed.programs, files)
        assert replaced.files_fingerprint != renewed.files_fingerprint
        renewed = Manifest.from_json(replaced.to_json(), "here")
    assert renewed.fingerprint == first.fingerprint
    assert renewed.matches(recorded("fp16").fingerprint)
    assert not renewed.matches(recorded("int8").fingerprint)
    assert len(renewed.earlier_fingerprints) == 2


@pytest.mark.parametrize(
    "path", ["transformer/weights.safetensors", "text_encoder/embeddings.safetensors", "tokenizer.json"]
)
def test_programs_are_not_replaced_together_with_weights(bundles: dict[str, Path], path: str) -> None:
    manifest = Bundle.open(bundles["fp16"]).manifest
    with raises_with(ValueError, "programs", "weights"):
        manifest.with_programs(manifest.programs, {**manifest.files, path: FileRecord(1, "0" * 64)})


@pytest.mark.parametrize("value", ["0" * 64, [5], ["0" * 63], {}])
def test_earlier_fingerprints_that_are_none_are_refused(
    bundles: dict[str, Path], tmp_path: Path, value: object
) -> None:
    root = edited(bundles["fp16"], tmp_path / "bundle", lambda d: d.update(earlier_fingerprints=value))
    with raises_with(BundleError, root / "manifest.json", "earlier_fingerprints"):
        Bundle.open(root)


def test_an_image_of_then_replays(bundles: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "again.png"
    outcome = call_rt(capsys, "run", "--replay", image_of("fp16"), "-m", bundles["fp16"], "-o", out, "--quiet")
    assert outcome.status == 0, outcome.err
    with Image.open(out) as again, Image.open(image_of("fp16")) as expected:
        assert np.abs(np.asarray(again, int) - np.asarray(expected, int)).max() <= 1
    outcome = call_rt(capsys, "run", "--replay", image_of("fp16"), "-m", bundles["int8"], "-o", out, "--quiet")
    assert_one_line_error(
        outcome, image_of("fp16"), recorded("fp16").model, Bundle.open(bundles["int8"]).manifest.name, "-m"
    )
