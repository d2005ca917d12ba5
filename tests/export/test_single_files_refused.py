"""A single file that does not give a whole supported component is refused with one clear line that names it."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mistaken_contents import MISTAKEN
from safetensors.torch import save_file
from single_file_tools import PARTS, Tensors, to_comfy_transformer, to_ldm_vae, write_headers

from zimage_export.build import BuildOptions, build
from zimage_export.cli import cli
from zimage_export.errors import CheckpointError
from zimage_export.source.checkpoint import Checkpoint, Weights
from zimage_export.source.single_files import SingleFiles
from zimage_runtime.bundle.tensors import read_header
from zimage_runtime.command_line.console import run_command
from zimage_runtime.command_line.progress import Progress


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"layers.0.attention.qkv.weight": "F8_E4M3"}, r"fp8.*not supported yet.*z_image_turbo_bf16\.safetensors"),
        ({"layers.0.attention.qkv.weight": "F8_E5M2"}, r"fp8.*not supported yet.*z_image_turbo_bf16\.safetensors"),
        ({"layers.0.attention.qkv.scale_weight": "F32"}, r"fp8.*not supported yet.*z_image_turbo_bf16\.safetensors"),
        ({"model.diffusion_model.scaled_fp8": "F32"}, r"fp8.*not supported yet.*z_image_turbo_bf16\.safetensors"),
        ({"layers.0.attention.qkv.comfy_quant": "U8"}, r"4-bit.*not supported yet.*z_image_turbo_bf16\.safetensors"),
        ({"layers.0.attention.to_qkv.qweight": "I32"}, r"4-bit.*not supported yet.*z_image_turbo_bf16\.safetensors"),
        ({"diffusion_model.layers.0.attention.qkv.lora_A.weight": "BF16"}, "is a LoRA, not a model"),
        ({"lora_unet_layers_0_attention_qkv.lora_down.weight": "BF16"}, "is a LoRA, not a model"),
        ({"lycoris_layers_0_attention_qkv.lokr_w1": "BF16"}, "is a LoRA, not a model"),
        ({"double_blocks.0.img_attn.qkv.weight": "BF16"}, "no Z-Image transformer .*x_pad_token"),
    ],
)
def test_unsupported_content_is_named(tensors: dict[str, str], said: str, tmp_path: Path) -> None:
    path = write_headers(tmp_path / "a.safetensors", {name: (dtype, (2, 2)) for name, dtype in tensors.items()})
    with pytest.raises(CheckpointError, match=f"{path}: .*{said}"):
        Weights.in_file("transformer", path)


@pytest.mark.parametrize(("part", "instead"), [("text_encoder", "qwen_3_4b"), ("vae", "ae")])
def test_what_to_use_instead_is_the_parts_own(part: str, instead: str, tmp_path: Path) -> None:
    path = write_headers(tmp_path / "a.safetensors", {"decoder.conv_in.weight": ("F8_E4M3", (2, 2))})
    with pytest.raises(CheckpointError, match=rf"not supported yet.*\({instead}\.safetensors\)"):
        Weights.in_file(part, path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("z_image_turbo-Q4_K.gguf", b"GGUF\3\0\0\0", "GGUF is not supported yet; use the safetensors file"),
        ("renamed.safetensors", b"GGUF\3\0\0\0\0\0\0\0", "GGUF is not supported yet; use the safetensors file"),
        ("model.ckpt", b"PK\3\4", "is a pickle.*use a safetensors file"),
        ("model.pt", b"PK\3\4", "is a pickle.*use a safetensors file"),
        ("model.bin", b"\x80\2", "is a pickle.*use a safetensors file"),
        ("empty.safetensors", b"", "truncated"),
        *((f"{what}.safetensors", content, ".*".join(said)) for what, (content, said) in MISTAKEN.items()),
    ],
)
def test_other_formats_are_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}: .*{said}"):
        Weights.in_file("transformer", path)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Weights.in_file("vae", tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match=r"is a directory; give the VAE's file \(ae\.safetensors\)"):
        Weights.in_file("vae", tmp_path)


@pytest.mark.parametrize("given", PARTS)
@pytest.mark.parametrize("wanted", PARTS)
def test_another_component_is_told_apart(given: str, wanted: str, comfy: SingleFiles) -> None:
    titles = {"transformer": "Z-Image transformer", "text_encoder": "Qwen3 text encoder", "vae": "VAE"}
    path = comfy.get(given)
    assert path is not None
    if given == wanted:
        assert Weights.in_file(wanted, path).names()
        return
    with pytest.raises(CheckpointError, match=f"{path}: .*{titles[given]}.*expected a {titles[wanted]}"):
        Weights.in_file(wanted, path)


def test_vae_of_another_model_is_refused(stored: dict[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "sdxl_vae.safetensors"
    save_file(to_ldm_vae(stored["vae"]) | {"post_quant_conv.weight": torch.zeros(4, 4, 1, 1)}, path)
    with pytest.raises(CheckpointError, match=f"{path}: .*quant_conv"):
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
    ("alter", "said"),
    [
        (_drop_norm, r"tensor layers\.1\.attention_norm1\.weight not found"),
        (_drop_qkv, r"tensor layers\.1\.attention\.to_q\.weight not found"),
        (_narrow, r"layers\.1\.attention\.to_q\.weight has shape \[85, 256\], the configuration says \[256, 256\]"),
        (_fuse_badly, r"layers\.1\.attention\.qkv\.weight has shape \[256, 256\], which is not query, key and value"),
        (_add_layer, r"has n_layers 3, but the configuration has 2|tensor layers\.2\..* not found"),
    ],
)
def test_wrong_tensor_is_named_with_its_file(
    folder: str,
    alter: Callable[[Tensors], None],
    said: str,
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
    with pytest.raises(CheckpointError, match=f"^{path}: {said}"):
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
def test_shapes_that_tell_nothing_are_refused(
    part: str, name: str, shape: tuple[int, ...], wide: SingleFiles, single_files_model: Path, tmp_path: Path
) -> None:
    source = wide.get(part)
    assert source is not None
    tensors = {key: (entry.dtype, entry.shape) for key, entry in read_header(source).items()}
    path = write_headers(tmp_path / source.name, {**tensors, name: ("BF16", shape)})
    with pytest.raises(CheckpointError, match=rf"^{path}: .* has shape {re.escape(str(list(shape)))}"):
        Checkpoint.open(single_files_model / "tokenizer", replace(wide, **{part: path}))


def test_some_files_still_need_a_checkpoint(single_files_model: Path, wide: SingleFiles, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        Checkpoint.open(single_files_model / "tokenizer", replace(wide, vae=None))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: tokenizer\.json not found"):
        Checkpoint.open(tmp_path, wide)


def test_model_index_need_not_know_an_overridden_part(
    single_files_model: Path, comfy: SingleFiles, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(single_files_model, copy)
    path = copy / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "transformer": [None, None], "vae": ["diffusers", "Other"]}))
    with pytest.raises(CheckpointError, match="vae 'Other' is not supported"):
        Checkpoint.open(copy, SingleFiles(transformer=comfy.transformer))
    assert Checkpoint.open(copy, replace(comfy, text_encoder=None)).name == "my_finetune"


def test_command_says_what_is_wrong_in_one_line(
    single_files_model: Path, comfy: SingleFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run_command(
        cli, ["build", str(single_files_model), str(tmp_path / "out"), "--transformer", str(comfy.vae)]
    )
    lines = capsys.readouterr().err.splitlines()
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {comfy.vae}: contains a VAE")
