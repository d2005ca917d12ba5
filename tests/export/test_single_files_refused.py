"""A single file that does not give a whole supported component is refused with one clear line that names it."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from facts import assert_facts, raises_with
from mistaken_contents import MISTAKEN
from safetensors.torch import save_file
from single_file_tools import PARTS, Tensors, to_comfy_transformer, to_ldm_vae, write_headers

from zimage_export.build import BuildOptions, build
from zimage_export.cli import cli
from zimage_export.errors import CheckpointError
from zimage_export.source.checkpoint import Checkpoint, OpenOptions
from zimage_export.source.single_files import SingleFiles
from zimage_export.source.weights import Weights
from zimage_runtime.bundle.tensors import read_header
from zimage_runtime.command_line.console import run_command
from zimage_runtime.command_line.progress import Progress


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("z_image_turbo-Q4_K.gguf", b"GGUF\3\0\0\0", ["truncated"]),
        ("renamed.safetensors", b"GGUF\3\0\0\0\0\0\0\0", ["truncated"]),
        ("old.gguf", b"GGUF\1\0\0\0" + bytes(64), ["GGUF", "version"]),
        ("renamed.gguf", b"\x10\0\0\0\0\0\0\0{}", ["GGUF", "z_image_turbo_bf16.safetensors"]),
        ("empty.gguf", b"", ["truncated", "z_image_turbo_bf16.safetensors"]),
        ("model.ckpt", b"PK\3\4", ["pickle", "z_image_turbo_bf16.safetensors"]),
        ("model.pt", b"PK\3\4", ["pickle", "z_image_turbo_bf16.safetensors"]),
        ("model.bin", b"\x80\2", ["pickle", "z_image_turbo_bf16.safetensors"]),
        ("empty.safetensors", b"", ["truncated", "0 bytes"]),
        *((f"{what}.safetensors", content, facts) for what, (content, facts) in MISTAKEN.items()),
    ],
)
def test_other_formats_are_refused(name: str, content: bytes, facts: Sequence[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with raises_with(CheckpointError, path, *facts):
        Weights.in_file("transformer", path)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with raises_with(CheckpointError, tmp_path / "ae.safetensors", "no such file"):
        Weights.in_file("vae", tmp_path / "ae.safetensors")
    with raises_with(CheckpointError, tmp_path, "directory", "VAE", "ae.safetensors"):
        Weights.in_file("vae", tmp_path)


@pytest.mark.parametrize("given", PARTS)
@pytest.mark.parametrize("wanted", PARTS)
def test_another_component_is_recognized(given: str, wanted: str, comfy: SingleFiles) -> None:
    titles = {"transformer": "Z-Image transformer", "text_encoder": "Qwen3 text encoder", "vae": "VAE"}
    path = comfy.get(given)
    assert path is not None
    if given == wanted:
        assert Weights.in_file(wanted, path).names()
        return
    with raises_with(CheckpointError, path, titles[given], titles[wanted]):
        Weights.in_file(wanted, path)


def test_vae_of_another_model_is_refused(stored: dict[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "sdxl_vae.safetensors"
    save_file(to_ldm_vae(stored["vae"]) | {"post_quant_conv.weight": torch.zeros(4, 4, 1, 1)}, path)
    with raises_with(CheckpointError, path, "quant_conv", "ae.safetensors"):
        Weights.in_file("vae", path)


def _drop_norm(tensors: Tensors) -> None:
    del tensors["layers.1.attention_norm1.weight"]


def _drop_qkv(tensors: Tensors) -> None:
    del tensors["layers.1.attention.qkv.weight"]


def _narrow(tensors: Tensors) -> None:
    tensors["layers.1.attention.qkv.weight"] = torch.zeros(255, 256)


def _fuse_badly(tensors: Tensors) -> None:
    tensors["layers.1.attention.qkv.weight"] = torch.zeros(256, 256)


def _add_layer(tensors: Tensors) -> None:
    tensors["layers.2.attention_norm1.weight"] = torch.zeros(256)


@pytest.mark.parametrize("folder", ["with-config", "without"])
@pytest.mark.parametrize(
    ("alter", "facts"),
    [
        (_drop_norm, ["layers.1.attention_norm1.weight", "not found"]),
        (_drop_qkv, ["layers.1.attention.to_q.weight", "not found"]),
        (_narrow, ["layers.1.attention.to_q.weight", "[85, 256]", "[256, 256]"]),
        (_fuse_badly, ["layers.1.attention.qkv.weight", "[256, 256]", "query, key and value"]),
        (_add_layer, None),
    ],
)
def test_wrong_tensor_is_named_with_its_file(
    folder: str,
    alter: Callable[[Tensors], None],
    facts: list[str] | None,
    single_files_model: Path,
    stored: dict[str, Tensors],
    tmp_path: Path,
) -> None:
    tensors = to_comfy_transformer(stored["transformer"])
    alter(tensors)
    path = tmp_path / "finetune.safetensors"
    save_file(tensors, path)
    rest = tmp_path / folder
    shutil.copytree(
        single_files_model, rest, ignore=shutil.ignore_patterns(*(["transformer"] if folder == "without" else []))
    )
    if facts is None:  # a configuration counts the layers; without one, the tensors do
        facts = ["n_layers", "3", "2"] if folder == "with-config" else ["layers.2", "not found"]
    with raises_with(CheckpointError, f"{path}:", *facts):
        build(rest, tmp_path / "out", BuildOptions(files=SingleFiles(transformer=path)), Progress(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "name", "shape"),
    [
        ("transformer", "x_pad_token", ()),
        ("transformer", "layers.0.attention.q_norm.weight", (0,)),
        ("text_encoder", "model.layers.0.self_attn.q_norm.weight", (0,)),
        ("text_encoder", "model.embed_tokens.weight", (2560,)),
        ("vae", "decoder.conv_in.weight", (512, 16)),
    ],
)
def test_shapes_that_determine_nothing_are_refused(
    part: str, name: str, shape: tuple[int, ...], wide: SingleFiles, single_files_model: Path, tmp_path: Path
) -> None:
    source = wide.get(part)
    assert source is not None
    tensors = {key: (entry.dtype, entry.shape) for key, entry in read_header(source).items()}
    path = write_headers(tmp_path / source.name, {**tensors, name: ("BF16", shape)})
    with raises_with(CheckpointError, f"{path}:", list(shape)):
        Checkpoint.open(single_files_model / "tokenizer", replace(wide, **{part: path}), OpenOptions(allow_pruned=True))


def test_some_files_still_need_a_checkpoint(single_files_model: Path, wide: SingleFiles) -> None:
    with raises_with(CheckpointError, single_files_model / "tokenizer", "model_index.json"):
        Checkpoint.open(single_files_model / "tokenizer", replace(wide, vae=None))


def test_model_index_need_not_know_an_overridden_part(
    single_files_model: Path, comfy: SingleFiles, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(single_files_model, copy)
    path = copy / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "transformer": [None, None], "vae": ["diffusers", "Other"]}))
    with raises_with(CheckpointError, path, "vae", "'Other'"):
        Checkpoint.open(copy, SingleFiles(transformer=comfy.transformer))
    assert Checkpoint.open(copy, replace(comfy, text_encoder=None)).name == "my_finetune"


def test_command_says_what_is_wrong_in_one_line(
    single_files_model: Path, comfy: SingleFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run_command(
        cli, ["build", str(single_files_model), str(tmp_path / "out"), "--transformer", str(comfy.vae)]
    )
    error = capsys.readouterr().err
    assert status == 1
    assert_facts(error.strip(), "error:", comfy.vae, "VAE", "Z-Image transformer", "z_image_turbo_bf16.safetensors")
