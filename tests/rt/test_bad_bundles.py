"""Bundles that cannot be generated with: one line that names the file, before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_rt, unchanged
from facts import assert_facts, raises_with
from mistaken_contents import MISTAKEN

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import DType, encode_header
from zimage_runtime.errors import BundleError

FILES = [
    "tokenizer.json",
    "text_encoder/embeddings.safetensors",
    "transformer/weights.safetensors",
    "transformer/denoiser.cpu.onnx",
    "vae/weights.safetensors",
]


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def refuse(capsys: Capture, path: Path, *named: object) -> str:
    """Asks for an image, asserts that there is none and that nothing was written, and returns the error."""
    output = path.parent / "image.png"
    with unchanged(path.parent):
        outcome = call_rt(capsys, "run", "a fox", "-m", path, "-o", output, "--size", "32x32", "--steps", 1, "--quiet")
    return assert_one_line_error(outcome, *named)


def edit_manifest(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = root / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_missing_bundle(tmp_path: Path, capsys: Capture) -> None:
    refuse(capsys, tmp_path / "nowhere", tmp_path / "nowhere", "bundle")


def test_directory_that_is_no_bundle(checkpoint: Path, capsys: Capture) -> None:
    refuse(capsys, checkpoint, checkpoint, "manifest.json", "zimage-export")


def test_file_instead_of_a_bundle(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    refuse(capsys, tmp_path / "model.onnx", tmp_path / "model.onnx", "bundle", "manifest.json", "zimage-export")


def test_manifest_that_is_a_folder(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bundle/manifest.json").mkdir(parents=True)
    refuse(capsys, tmp_path / "bundle", tmp_path / "bundle/manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(damaged: Path, capsys: Capture, name: str) -> None:
    (damaged / name).unlink()
    refuse(capsys, damaged, damaged / name, "missing")


@pytest.mark.parametrize("name", FILES)
def test_folder_in_place_of_a_file(damaged: Path, capsys: Capture, name: str) -> None:
    (damaged / name).unlink()
    (damaged / name).mkdir()
    refuse(capsys, damaged, damaged / name)


@pytest.mark.parametrize("name", FILES)
def test_truncated_file(damaged: Path, capsys: Capture, name: str) -> None:
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:-1])
    refuse(capsys, damaged, damaged / name, len(data) - 1, len(data))


@pytest.mark.parametrize("what", MISTAKEN)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_file_that_is_a_pointer_or_a_page_is_named_as_such(
    damaged: Path, capsys: Capture, name: str, what: str
) -> None:
    content, facts = MISTAKEN[what]
    (damaged / name).write_bytes(content)
    refuse(capsys, damaged, damaged / name, *facts)


@pytest.mark.parametrize("what", MISTAKEN)
@pytest.mark.parametrize("name", ["tokenizer.json", "text_encoder/embeddings.safetensors"])
def test_bundle_that_was_made_of_a_pointer_or_a_page_names_it(
    damaged: Path, capsys: Capture, name: str, what: str
) -> None:
    """Where even the manifest lists it with its size, reading the file finds it."""
    content, facts = MISTAKEN[what]
    (damaged / name).write_bytes(content)
    edit_manifest(damaged, lambda data: data["files"][name].update(size=len(content)))
    refuse(capsys, damaged, damaged / name, *facts)


@pytest.mark.parametrize("name", FILES)
def test_altered_file_is_found_by_its_hash(damaged: Path, capsys: Capture, name: str) -> None:
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    with raises_with(BundleError, damaged, "altered", name):
        Bundle.open(damaged).verify()
    outcome = call_rt(capsys, "info", damaged, "--verify")
    error = outcome.err.splitlines()[-1]
    assert (outcome.status, "Traceback" in outcome.err) == (1, False)
    assert_facts(error, "error:", damaged, "altered", name)
    assert [other for other in FILES if other in error] == [name]


def test_untouched_bundle_verifies(bundle: Path, capsys: Capture) -> None:
    outcome = call_rt(capsys, "info", bundle, "--verify")
    assert outcome.status == 0, outcome.err
    assert_facts(outcome.lines[-1], len(Bundle.open(bundle).manifest.files), "unchanged")


@pytest.mark.parametrize("name", ["transformer/denoiser.cpu.onnx", "vae/decoder.cpu.onnx", "tokenizer.json"])
def test_program_or_tokenizer_overwritten_with_as_many_bytes(damaged: Path, capsys: Capture, name: str) -> None:
    (damaged / name).write_bytes(b"\0" * (damaged / name).stat().st_size)
    refuse(capsys, damaged, damaged / name)


def replace_embeddings(root: Path, name: str, shape: tuple[int, ...]) -> None:
    """Puts another table in place of the embeddings, and lists it with its size."""
    path = root / "text_encoder/embeddings.safetensors"
    path.write_bytes(encode_header({name: (DType.F32, shape)}) + np.zeros(shape, np.float32).tobytes())
    size = path.stat().st_size
    edit_manifest(root, lambda data: data["files"]["text_encoder/embeddings.safetensors"].update(size=size))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embeddings", (320, 64)),
        ("embed_tokens.weight", (40, 64)),
        ("embed_tokens.weight", (320, 63)),
        ("embed_tokens.weight", (320 * 64,)),
        ("embed_tokens.weight", (0, 64)),
    ],
)
def test_embeddings_that_do_not_fit(damaged: Path, capsys: Capture, name: str, shape: tuple[int, ...]) -> None:
    replace_embeddings(damaged, name, shape)
    refuse(capsys, damaged, damaged / "text_encoder/embeddings.safetensors", "embed_tokens.weight")


def test_tokenizer_with_more_tokens_than_embeddings(damaged: Path, qwen_tokenizer: Path, capsys: Capture) -> None:
    shutil.copyfile(qwen_tokenizer, damaged / "tokenizer.json")
    size = qwen_tokenizer.stat().st_size
    edit_manifest(damaged, lambda data: data["files"]["tokenizer.json"].update(size=size))
    refuse(capsys, damaged, "token")


@pytest.mark.parametrize("text", ["", "{", "nul", "\x00", "[" * 100_000, "9" * 5000])
def test_manifest_that_is_not_json(damaged: Path, capsys: Capture, text: str) -> None:
    (damaged / "manifest.json").write_text(text)
    refuse(capsys, damaged, damaged / "manifest.json", "JSON")


@pytest.mark.parametrize("text", ["null", "[]", "5", '"zimage-bundle"', "{}", '{"format": "zimage-bundle"}'])
def test_manifest_of_something_else(damaged: Path, capsys: Capture, text: str) -> None:
    (damaged / "manifest.json").write_text(text)
    refuse(capsys, damaged, damaged / "manifest.json")


@pytest.mark.parametrize(("key", "value"), [("schema_version", 2), ("precision", "fp2")])
def test_manifest_of_a_newer_version(damaged: Path, capsys: Capture, key: str, value: object) -> None:
    edit_manifest(damaged, lambda data: data.update({key: value}))
    refuse(capsys, damaged, damaged / "manifest.json", value, "upgrade zimage-rt")


UNSAFE_PATHS = [
    "/etc/passwd",
    "../outside.safetensors",
    "vae/../../outside.safetensors",
    "..",
    "./vae/weights.safetensors",
    "vae//weights.safetensors",
    "vae\\weights.safetensors",
    "..\\outside.safetensors",
    "C:/outside.safetensors",
    "C:outside.safetensors",
    "vae/weights.safetensors:stream",
    "vae/\0",
    "vae/\ud800",
    "",
]


@pytest.mark.parametrize("path", UNSAFE_PATHS)
def test_manifest_with_an_unsafe_path(damaged: Path, capsys: Capture, path: str) -> None:
    (damaged.parent / "outside.safetensors").write_bytes(b"")
    record = {"size": 0, "sha256": "0" * 64}
    edit_manifest(damaged, lambda data: data["files"].update({path: record}))
    refuse(capsys, damaged, damaged / "manifest.json", "path")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "other.safetensors"])
@pytest.mark.parametrize("key", ["tokenizer", "embeddings"])
def test_manifest_that_uses_a_file_it_does_not_list(damaged: Path, capsys: Capture, key: str, path: str) -> None:
    edit_manifest(damaged, lambda data: data.update({key: path}))
    refuse(capsys, damaged, damaged / "manifest.json", path)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("config", "transformer", None),
        ("config", "vae", []),
        ("defaults", "width", "1024"),
        ("defaults", "steps", 0),
        ("source", "name", ""),
        ("source", "name", "\ud800"),
        ("programs", "denoiser", None),
        ("programs", "denoiser", {"cpu": {"path": "vae/weights.safetensors"}}),
        ("weights", "vae", 7),
        ("files", "tokenizer.json", {"size": -1, "sha256": "0" * 64}),
        ("files", "tokenizer.json", {"size": 1, "sha256": "sha"}),
    ],
)
def test_manifest_with_a_wrong_value(damaged: Path, capsys: Capture, section: str, key: str, value: object) -> None:
    edit_manifest(damaged, lambda data: data[section].update({key: value}))
    refuse(capsys, damaged, damaged / "manifest.json")


def test_bundle_without_a_program_for_the_executor(damaged: Path, capsys: Capture) -> None:
    def rename(data: dict[str, Any]) -> None:
        data["programs"]["text_encoder"] = {"other": data["programs"]["text_encoder"].pop("cpu")}

    edit_manifest(damaged, rename)
    refuse(capsys, damaged, damaged, "text_encoder", "cpu")
