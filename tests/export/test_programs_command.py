"""`zimage-export programs`: a bundle gains the programs that it lacks, and nothing else changes."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from cli_tools import Capture, assert_one_line_error, call_export

from zimage_export import programs as module
from zimage_export.cli import cli
from zimage_export.graphs import PROGRAM_SETS
from zimage_export.programs import add_programs
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY, WEBGPU, WEBGPU_FUSED, Precision
from zimage_runtime.bundle.tensors import DType, encode_header, read_header
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program

DATA = Path(__file__).parents[1] / "data"
LATER = {"fp16": set(), "int8": {(Program.DENOISER, CUDA_BLOCKS)}}
"""What CUDA's programs gained since."""

WEBGPU_PROGRAMS = {(p, WEBGPU) for p in MODEL_PROGRAMS if p is not Program.MODULATION} | {
    (Program.DENOISER, WEBGPU_FUSED)
}


def earlier(precision: str, out: Path) -> Path:
    """A bundle that an earlier version wrote, unpacked."""
    zipfile.ZipFile(DATA / f"bundle-9e9dc91-{precision}.zip").extractall(out)
    return out


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), "utf-8")


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_earlier_bundle_gains_what_it_lacks(precision: str, tmp_path: Path, capsys: Capture) -> None:
    root = earlier(precision, tmp_path / "bundle")
    before, first = contents(root), Bundle.open(root).manifest
    outcome = call_export(capsys, "programs", root, "--json", "--quiet")
    assert (outcome.status, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    bundle = Bundle.open(root)
    bundle.verify()
    assert {(Program(a["program"]), a["name"]) for a in report["added"]} == WEBGPU_PROGRAMS | LATER[precision]
    assert report["executors"] == sorted(bundle.manifest.executors) == [CPU, CUDA, WEBGPU]
    after = contents(root)
    assert after.keys() - before.keys() == {a["path"] for a in report["added"]}
    assert {a["path"]: a["bytes"] for a in report["added"]} == {n: len(after[n]) for n in after.keys() - before.keys()}
    del before["manifest.json"]
    assert {name: after[name] for name in before} == before
    # images that record either kind of fingerprint still match
    info = read_image_info(DATA / f"bundle-9e9dc91-{precision}.png")
    assert info is not None
    assert info.fingerprint is not None
    assert bundle.manifest.matches(info.fingerprint)
    assert bundle.manifest.fingerprint == first.fingerprint == report["fingerprint"]


def test_a_second_run_changes_nothing(tmp_path: Path, capsys: Capture) -> None:
    root = earlier("fp16", tmp_path / "bundle")
    assert call_export(capsys, "programs", root, "--quiet").lines == [str(root)]
    before = contents(root)
    assert json.loads(call_export(capsys, "programs", root, "--json", "--quiet").out)["added"] == []
    assert "already" in call_export(capsys, "programs", root).err
    assert contents(root) == before


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4])
def test_they_are_the_programs_that_an_export_writes(
    precision: Precision, bundle_in: Callable[[Precision], Path], tmp_path: Path
) -> None:
    """All of them, to the byte, and recorded with the same sizes in memory."""
    root = shutil.copytree(bundle_in(precision), tmp_path / "bundle")
    exported, expected = Bundle.open(root).manifest, contents(root)
    for path in root.rglob("*.onnx"):
        path.unlink()

    def without_programs(document: dict[str, Any]) -> None:
        document["programs"] = {}
        document["files"] = {name: record for name, record in document["files"].items() if not name.endswith(".onnx")}

    edit(root, without_programs)
    added = add_programs(Bundle.open(root)).added
    assert len(added) == sum(map(len, exported.programs.values()))
    manifest = Bundle.open(root).manifest
    assert manifest.programs == exported.programs
    assert manifest.files == exported.files
    found = contents(root)
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected


@pytest.mark.parametrize(
    ("executor", "expected"),
    [
        (WEBGPU, WEBGPU_PROGRAMS),
        (CUDA, {(Program.DENOISER, CUDA_WEIGHT_ONLY), (Program.CAPTION, CUDA), *LATER["int8"]}),
        (CPU, set()),
    ],
)
def test_only_for_the_executors_that_are_asked_for(
    executor: str, expected: set[tuple[Program, str]], tmp_path: Path, capsys: Capture
) -> None:
    """With all of an executor's forms of a program."""
    root = earlier("int8", tmp_path / "bundle")

    def without_some(document: dict[str, Any]) -> None:
        del document["programs"]["caption"][CUDA], document["programs"]["denoiser"][CUDA_WEIGHT_ONLY]

    edit(root, without_some)
    report = json.loads(call_export(capsys, "programs", root, "--executor", executor, "--json", "--quiet").out)
    assert {(Program(a["program"]), a["name"]) for a in report["added"]} == expected
    Bundle.open(root).verify()


def test_a_listed_file_is_not_overwritten(tmp_path: Path) -> None:
    """Until the manifest is replaced, the bundle must be what it was."""
    root = earlier("fp16", tmp_path / "bundle")
    edit(root, lambda document: document["programs"].pop("encoder"))
    content = (root / "vae" / "encoder.cpu.onnx").read_bytes()
    bundle = add_programs(Bundle.open(root), [CPU]).bundle
    record = bundle.manifest.programs[Program.ENCODER][CPU]
    assert record.path.startswith("vae/encoder.cpu.")
    assert record.path != "vae/encoder.cpu.onnx"
    assert (root / "vae" / "encoder.cpu.onnx").read_bytes() == content
    bundle.verify()


def test_a_run_that_fails_leaves_the_bundle_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = earlier("fp16", tmp_path / "bundle")
    before = contents(root)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", full)
        with pytest.raises(OSError, match="No space") as caught:
            add_programs(Bundle.open(root))
    assert caught.value.filename == str(root)  # and not of a temporary file
    assert {name: contents(root)[name] for name in before} == before
    assert not list(root.rglob("*.part"))
    Bundle.open(root).verify()
    assert len(add_programs(Bundle.open(root)).added) == len(WEBGPU_PROGRAMS)


def test_nothing_is_written_where_weights_are_missing(tmp_path: Path, capsys: Capture) -> None:
    root = earlier("int8", tmp_path / "bundle")
    path = root / "transformer" / "weights.safetensors"
    entries = read_header(path)
    data = path.read_bytes()
    kept = {name: entry for name, entry in entries.items() if name != "layers.0.attention.to_q.weight_scale"}
    header = encode_header({name: (DType(entry.dtype), entry.shape) for name, entry in kept.items()})
    path.write_bytes(header + b"".join(data[e.offset : e.offset + e.nbytes] for e in kept.values()))
    size = path.stat().st_size
    edit(root, lambda document: document["files"]["transformer/weights.safetensors"].update(size=size))
    before = contents(root)
    outcome = call_export(capsys, "programs", root, "--quiet")
    assert_one_line_error(outcome, path, "layers.0.attention.to_q.weight_scale", CUDA_BLOCKS, "export")
    assert contents(root) == before


def test_weights_of_another_shape_are_refused(tmp_path: Path, capsys: Capture) -> None:
    root = earlier("fp16", tmp_path / "bundle")
    path, name = root / "text_encoder" / "weights.safetensors", "layers.0.mlp.gate_proj.weight"
    rows, columns = read_header(path)[name].shape
    edit(root, lambda document: document["config"]["text_encoder"].update(intermediate_size=2 * rows))
    before = contents(root)
    outcome = call_export(capsys, "programs", root, "--quiet")
    shapes = [2 * rows, columns], [rows, columns]
    assert_one_line_error(outcome, path, name, "F16", *shapes, "export the bundle again")
    assert contents(root) == before


def test_bf16_has_no_programs_for_webgpu(
    bundle_in: Callable[[Precision], Path], tmp_path: Path, capsys: Capture
) -> None:
    root = shutil.copytree(bundle_in(Precision.BF16), tmp_path / "bundle")
    outcome = call_export(capsys, "programs", root, "--executor", "webgpu", "--quiet")
    assert_one_line_error(outcome, root, "webgpu", "bf16", "fp16", "int8")
    assert call_export(capsys, "programs", root, "--quiet").lines == [str(root)]
    assert Bundle.open(root).manifest.executors == {CPU, CUDA}


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert_one_line_error(call_export(capsys, "programs", tmp_path, "--quiet"), tmp_path, "not a bundle")


def test_the_list_of_commands_cuts_no_sentence(capsys: Capture) -> None:
    out = call_export(capsys, "--help").out
    assert "programs" in out
    assert "..." not in out.replace("[ARGS]...", "")


def test_every_executor_of_the_registry_can_be_named() -> None:
    option = next(p for p in cli.commands["programs"].params if p.name == "executors")
    assert isinstance(option.type, click.Choice)
    assert set(option.type.choices) == {s.executor for s in PROGRAM_SETS.values() if s.programs}


def test_of_the_export_extra_only_onnx_is_needed(tmp_path: Path) -> None:
    root = earlier("int8", tmp_path / "bundle")
    absent = ("torch", "diffusers", "transformers", "safetensors", "optimum")
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from zimage_export.cli import main
sys.argv = ["zimage-export", "programs", {str(root)!r}, "--quiet"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{root}\n", "")
    assert WEBGPU in Bundle.open(root).manifest.executors


def test_without_onnx_the_command_says_what_to_install(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage_export.errors.find_spec", lambda name: None)
    root = earlier("fp16", tmp_path / "bundle")
    assert_one_line_error(call_export(capsys, "programs", root, "--quiet"), "pip install onnx")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_program_whose_file_is_missing_or_cut_is_written_again(
    damage: str, tmp_path: Path, capsys: Capture, bundle: Path
) -> None:
    root = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    first = Bundle.open(root).manifest
    path = root / first.programs[Program.CAPTION][CUDA].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-7]) if damage == "cut" else path.unlink()
    assert_one_line_error(call_export(capsys, "verify", root, "--reference", root, "--quiet"), path.name, "programs")
    outcome = call_export(capsys, "programs", root, "--executor", "cpu", "--json", "--quiet")
    assert (outcome.status, outcome.err) == (0, "")
    renewed = Bundle.open(root)
    renewed.verify()
    assert renewed.program(Program.CAPTION, CUDA).read_bytes() == whole
    assert [(a["program"], a["name"]) for a in json.loads(outcome.out)["added"]] == [("caption", CUDA)]
    assert renewed.manifest.fingerprint == first.fingerprint
