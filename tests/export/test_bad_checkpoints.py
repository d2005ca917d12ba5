"""Checkpoints that cannot be exported: each fails with one line that names the culprit, and writes nothing."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Capture, assert_one_line_error, call_export, unchanged
from mistaken_contents import MISTAKEN

from zimage_runtime.bundle.tensors import DType, encode_header, read_header

SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def refuse(capsys: Capture, model: Path, *named: object) -> str:
    """Builds, asserts that it fails and leaves nothing, and returns the line it says."""
    folder = model.parent
    with unchanged(folder):
        return assert_one_line_error(call_export(capsys, "build", model, folder / "bundle", "--quiet"), *named)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a safetensors header in place; the data stays as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_missing_directory(tmp_path: Path, capsys: Capture) -> None:
    refuse(capsys, tmp_path / "nowhere", tmp_path / "nowhere", "directory", "diffusers")


def test_file_instead_of_a_directory(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model.safetensors").write_bytes(encode_header({}))
    refuse(capsys, tmp_path / "model.safetensors", tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("precision", "tensor"),
    [
        ("fp32", "layers.0.attention.to_out.0.weight"),
        ("int8", "layers.0.attention.to_v.weight"),
        ("int8", "layers.0.feed_forward.w3.weight"),
        ("int8", "layers.0.attention_norm1.weight"),
    ],
)
def test_values_that_are_not_finite_are_named(
    damaged: Path, capsys: Capture, recwarn: pytest.WarningsRecorder, tensor: str, precision: str
) -> None:
    """In weights that are looked at before any is written: nothing else is said, no warning of numpy either."""
    index = json.loads((damaged / INDEX).read_text())
    shard = damaged / "transformer" / index["weight_map"][tensor]
    entry = read_header(shard)[tensor]
    with shard.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"\x00\x00\x80\x7f")  # infinity, in float32 and in the upper half of bf16
    outcome = call_export(capsys, "build", damaged, damaged.parent / "bundle", "--precision", precision, "--quiet")
    assert_one_line_error(outcome, shard, tensor, "finite")
    assert not recwarn.list


def test_directory_that_is_no_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "photos").mkdir()
    refuse(capsys, tmp_path / "photos", tmp_path / "photos", "model_index.json")


@pytest.mark.parametrize(
    "name",
    [
        SHARD,
        VAE,
        "transformer/config.json",
        "text_encoder/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_missing_file(damaged: Path, capsys: Capture, name: str) -> None:
    (damaged / name).unlink()
    refuse(capsys, damaged, (damaged / name).parent)


def test_missing_shard_is_named(damaged: Path, capsys: Capture) -> None:
    (damaged / SHARD).unlink()
    refuse(capsys, damaged, damaged / SHARD, "no such file")


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -100_000], ids=["empty", "length", "header", "one byte", "data"])
@pytest.mark.parametrize("name", [SHARD, VAE])
def test_truncated_shard(damaged: Path, capsys: Capture, name: str, keep: int) -> None:
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:keep])
    refuse(capsys, damaged, damaged / name, "truncated")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 4096,
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 8) + b"\xff\xfe\xfd\xfc    ",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["ones", "null", "not text", "deeply nested"],
)
def test_shard_that_is_garbage(damaged: Path, capsys: Capture, garbage: bytes) -> None:
    (damaged / SHARD).write_bytes(garbage)
    refuse(capsys, damaged, damaged / SHARD)


@pytest.mark.parametrize("what", MISTAKEN)
@pytest.mark.parametrize(
    "name",
    [SHARD, VAE, INDEX, "model_index.json", "vae/config.json", "tokenizer/tokenizer.json"],
)
def test_file_that_is_a_pointer_or_a_page_is_named_as_such(
    damaged: Path, capsys: Capture, name: str, what: str
) -> None:
    content, said = MISTAKEN[what]
    (damaged / name).write_bytes(content)
    refuse(capsys, damaged, damaged / name, *said)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"dtype": "F32"},
        {"dtype": "F32", "shape": [96], "data_offsets": [0]},
        {"dtype": "F32", "shape": [96], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [-96], "data_offsets": [0, 384]},
        {"dtype": "F32", "shape": [96.0], "data_offsets": [0, 384]},
        {"dtype": "F32", "shape": [96], "data_offsets": [0, 380]},
        {"dtype": "F32", "shape": [2**62] * 1000, "data_offsets": [0, 384]},
        {"dtype": 7, "shape": [96], "data_offsets": [0, 384]},
    ],
)
def test_malformed_header_entry(damaged: Path, capsys: Capture, entry: object) -> None:
    name = next(iter(read_header(damaged / SHARD)))
    edit_header(damaged / SHARD, lambda header: header.update({name: entry}))
    refuse(capsys, damaged, damaged / SHARD, name)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"layers.0.attention.to_q.weight": 5}}',
        '{"weight_map": {"layers.0.attention.to_q.weight": "../vae/diffusion_pytorch_model.safetensors"}}',
        '{"weight_map": {"layers.0.attention.to_q.weight": "/etc/passwd"}}',
        '{"weight_map": {"layers.0.attention.to_q.weight": ""}}',
        '{"weight_map": {"layers.0.attention.to_q.weight": "."}}',
        '{"weight_map": {"layers.0.attention.to_q.weight": ".."}}',
        '{"weight_map": {"layers.0.attention.to_q.weight": "a\\u0000b"}}',
        '{"weight_map": {}}',
    ],
)
def test_malformed_index(damaged: Path, capsys: Capture, index: str) -> None:
    (damaged / INDEX).write_text(index)
    refuse(capsys, damaged, damaged / "transformer")


def test_index_that_names_a_tensor_its_shard_lacks(damaged: Path, capsys: Capture) -> None:
    edit_json(damaged / INDEX, lambda data: data["weight_map"].update({"layers.9.w": Path(SHARD).name}))
    refuse(capsys, damaged, damaged / SHARD, "layers.9.w")


def test_missing_tensor(damaged: Path, capsys: Capture) -> None:
    edit_header(damaged / VAE, lambda header: header.pop("decoder.conv_in.weight"))
    refuse(capsys, damaged, damaged / "vae", "decoder.conv_in.weight")


def test_missing_embeddings(damaged: Path, capsys: Capture) -> None:
    name = "model.embed_tokens.weight"
    index = damaged / "text_encoder/model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].pop(name))
    refuse(capsys, damaged, damaged / "text_encoder", "embed_tokens.weight")


def test_tensor_of_the_wrong_shape(damaged: Path, capsys: Capture) -> None:
    name = "decoder.conv_in.weight"
    edit_header(damaged / VAE, lambda header: header[name]["shape"].reverse())
    refuse(capsys, damaged, damaged / VAE, name, "[3, 3, 16, 32]", "[32, 16, 3, 3]")


@pytest.mark.parametrize("dtype", ["I64", "F8_E4M3", DType.I8, "F4", "bfloat16"])
def test_unexpected_element_type(damaged: Path, capsys: Capture, dtype: str) -> None:
    def retype(header: dict[str, Any]) -> None:
        entry = header["decoder.conv_in.weight"]
        begin, end = entry["data_offsets"]
        size = 1 if dtype == DType.I8 else 2
        entry.update(dtype=str(dtype), data_offsets=[begin, begin + (end - begin) // 2 * size])

    edit_header(damaged / VAE, retype)
    refuse(capsys, damaged, damaged / VAE, "decoder.conv_in.weight", dtype)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "StableDiffusionXLPipeline"),
        ("_class_name", None),
        ("_class_name", ["ZImagePipeline"]),
        ("transformer", ["diffusers", "FluxTransformer2DModel"]),
        ("transformer", ["diffusers", ["ZImageTransformer2DModel"]]),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("vae", None),
        ("vae", 5),
    ],
)
def test_unknown_architecture(damaged: Path, capsys: Capture, key: str, value: object) -> None:
    edit_json(damaged / "model_index.json", lambda data: data.update({key: value}))
    line = refuse(capsys, damaged, damaged / "model_index.json")
    assert "ZImage" in line or key in line


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "\ufeff\u0000", "[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json"])
def test_json_that_is_none(damaged: Path, capsys: Capture, name: str, text: str) -> None:
    (damaged / name).write_text(text)
    refuse(capsys, damaged, damaged / name)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("transformer/config.json", "dim", "96"),
        ("transformer/config.json", "dim", None),
        ("transformer/config.json", "dim", True),
        ("transformer/config.json", "dim", 95),
        ("transformer/config.json", "n_layers", 0),
        ("transformer/config.json", "n_layers", -3),
        ("transformer/config.json", "n_heads", 3.0),
        ("transformer/config.json", "norm_eps", "small"),
        ("transformer/config.json", "axes_dims", 32),
        ("transformer/config.json", "axes_dims", [8, 12]),
        ("transformer/config.json", "axes_dims", [8, 12, 14]),
        ("transformer/config.json", "axes_lens", [1536, None, 512]),
        ("transformer/config.json", "all_patch_size", 2),
        ("transformer/config.json", "all_patch_size", [4]),
        ("transformer/config.json", "qk_norm", False),
        ("transformer/config.json", "n_kv_heads", 1),
        ("text_encoder/config.json", "model_type", "llama"),
        ("text_encoder/config.json", "head_dim", 31),
        ("text_encoder/config.json", "rope_theta", "1e6"),
        ("text_encoder/config.json", "hidden_size", 65),
        ("vae/config.json", "block_out_channels", "16"),
        ("vae/config.json", "block_out_channels", [16, 17]),
        ("vae/config.json", "down_block_types", 4),
        ("vae/config.json", "latent_channels", 4),
        ("vae/config.json", "scaling_factor", 0),
        ("scheduler/scheduler_config.json", "shift", []),
        ("scheduler/scheduler_config.json", "use_dynamic_shifting", True),
    ],
)
def test_configuration_with_a_wrong_value(damaged: Path, capsys: Capture, name: str, key: str, value: object) -> None:
    edit_json(damaged / name, lambda data: data.update({key: value}))
    line = refuse(capsys, damaged, damaged.name)
    assert ".json" in line


def test_configuration_that_lacks_a_value(damaged: Path, capsys: Capture) -> None:
    edit_json(damaged / "transformer/config.json", lambda data: data.pop("n_layers"))
    refuse(capsys, damaged, damaged / "transformer/config.json", "n_layers")


def test_tokenizer_that_is_none(damaged: Path, capsys: Capture) -> None:
    (damaged / "tokenizer/tokenizer.json").write_text('{"version": "1.0"}')
    refuse(capsys, damaged, damaged / "tokenizer/tokenizer.json", "tokenizer")


@pytest.mark.deep
def test_tokenizer_with_more_tokens_than_embeddings(damaged: Path, qwen_tokenizer: Path, capsys: Capture) -> None:
    shutil.copyfile(qwen_tokenizer, damaged / "tokenizer/tokenizer.json")
    refuse(capsys, damaged, damaged / "tokenizer/tokenizer.json", "151669", "320")
