"""Broken and foreign files: each is refused in one line by what it is, and what to use instead.

A file that is read as something that it is not gives a bundle that generates noise, or a white image.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from facts import raises_with
from form_writers import E4M3, WRITERS, as_bytes, comfy_tensors, write_gguf
from safetensors.torch import save_file
from single_file_tools import Tensors, to_comfy_transformer, to_ldm_vae, write_headers

from zimage_export.errors import CheckpointError
from zimage_export.source.checkpoint import Checkpoint, OpenOptions
from zimage_export.source.single_files import SingleFiles
from zimage_export.source.weights import Weights
from zimage_runtime.bundle.tensors import read_header

pytestmark = pytest.mark.deep

QKV = "layers.0.attention.qkv"
GOOD = "z_image_turbo_bf16.safetensors"

# --- adapters and other models: recognized by their names ----------------------------------------------------

ADAPTERS = [
    "transformer.layers.0.attention.to_q.lora_A.weight",
    "base_model.model.layers.0.attention.to_q.lora_A.default.weight",
    "layers.0.attention.to_q.lora_B.default.weight",
    "diffusion_model.layers.0.attention.to_q.lora_A.weight",
    "diffusion_model.layers.0.attention.to_q.lokr_w1",
    "lycoris_layers_0_attention_to_q.lokr_w2_a",
    "lora_unet_layers_0_attention_to_q.lora_down.weight",
    "lora_unet__layers_0_attention_to_q.lora_up.weight",
    "lora_unet_layers_0_attention_to_q.alpha",
    "lora_unet_layers_0_attention_to_q.hada_w1_a",
    "context.refiner.0.attention.to.q.lora.down.weight",
    "layers.0.attention.to_q.lora_linear_layer.up.weight",
    "layers.0.attention.to_q_lora.up.weight",
    "transformer.layers.0.attention.to_q.lora_magnitude_vector.weight",
    "transformer.layers.0.attention.to_q.dora_scale",
    "diffusion_model.layers.0.attention_norm1.diff",
    "diffusion_model.layers.0.attention.to_q.diff_b",
    "layers.0.attention.to_q.oft_blocks",
    "layers.0.attention.to_q.boft_blocks",
]

OTHERS = [
    ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
    ("model.diffusion_model.double_stream_modulation_img.lin.weight", "FLUX"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
    ("model.diffusion_model.input_blocks.0.0.weight", "UNet"),
    ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
    ("blocks.0.cross_attn.q.weight", "Wan"),
    ("text_model.encoder.layers.0.mlp.fc1.weight", "CLIP"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
    ("model.layers.0.self_attn.q_proj.weight", "language model"),
    ("blk.0.attn_q.weight", "language model"),
    ("decoder.layers.3.conv.0.weight", "TAESD"),
    ("something.else", "x_pad_token"),
]


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_spelling_of_lora(name: str, tmp_path: Path) -> None:
    path = write_headers(tmp_path / "a.safetensors", {name: ("BF16", (2, 2))})
    with raises_with(CheckpointError, path, "LoRA", "merge", name):
        Weights.in_file("transformer", path)


@pytest.mark.parametrize(("name", "what"), OTHERS)
def test_other_models(name: str, what: str, tmp_path: Path) -> None:
    path = write_headers(tmp_path / "a.safetensors", {name: ("BF16", (2, 2))})
    with raises_with(CheckpointError, path, what, GOOD):
        Weights.in_file("transformer", path)


def test_a_controlnet(tmp_path: Path) -> None:
    names = ("control_layers.0.attention.to_q.weight", "control_all_x_embedder.2-1.weight")
    for name in names:
        path = write_headers(tmp_path / "a.safetensors", {name: ("BF16", (2, 2))})
        with raises_with(CheckpointError, path, "ControlNet", name):
            Weights.in_file("transformer", path)


# --- relatives of Z-Image, which have its names -----------------------------------------------------------------------


def resized(tensors: dict[str, tuple[str, tuple[int, ...]]], width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {n: (d, tuple(width if side == 3840 else side for side in shape)) for n, (d, shape) in tensors.items()}


@pytest.fixture(scope="module")
def published(wide: SingleFiles) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Names, types and shapes of the published files, with fewer layers."""
    found = {}
    for part in ("transformer", "text_encoder", "vae"):
        path = wide.get(part)
        assert path is not None
        found[part] = {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()}
    return found


Headers = dict[str, tuple[str, tuple[int, ...]]]


def _without(*starts: str) -> Callable[[Headers], Headers]:
    return lambda h: {name: value for name, value in h.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("part", "change", "facts"),
    [
        ("transformer", lambda h: {**h, "siglip_pad_token": ("BF16", (1, 3840))}, ["Omni", "siglip_pad_token"]),
        ("transformer", lambda h: {**h, "siglip_embedder.0.weight": ("BF16", (1152,))}, ["Omni", "Edit"]),
        ("transformer", lambda h: {**h, "t_embedder_2.mlp.0.weight": ("BF16", (2, 2))}, ["TwinFlow", "t_embedder_2."]),
        ("transformer", lambda h: {**h, "dec_net.cond_embed.weight": ("BF16", (2, 2))}, ["pixel-space", "dec_net."]),
        ("transformer", _without("final_layer"), ["final_layer", "pixel-space"]),
        ("transformer", lambda h: resized(h, 2304), [2304, "Lumina 2", 3840]),
        ("transformer", lambda h: _without("x_pad", "cap_pad")(resized(h, 2304)), [2304, "Lumina 2", 3840]),
        ("transformer", lambda h: resized(h, 3072), [3072, 3840]),
        ("vae", lambda h: {**h, "bn.running_mean": ("F32", (128,))}, ["FLUX.2", 32]),
        ("vae", lambda h: {**h, "decoder.conv_in.weight": ("BF16", (512, 32, 3, 3))}, ["FLUX.2", 32]),
        ("vae", lambda h: {**h, "quant_conv.weight": ("BF16", (8, 8, 1, 1))}, ["quant_conv", "ae.safetensors"]),
        ("text_encoder", lambda h: {**h, "model.visual.blocks.0.x": ("BF16", (2,))}, ["Qwen3-VL"]),
    ],
)
def test_relatives(
    part: str, change: Callable[[Headers], Headers], facts: list[object], published: dict[str, Headers], tmp_path: Path
) -> None:
    path = write_headers(tmp_path / "a.safetensors", change(published[part]))
    with raises_with(CheckpointError, path, *facts):
        Weights.in_file(part, path)


def test_a_larger_text_encoder_is_named(wide: SingleFiles, published: dict[str, Headers], tmp_path: Path) -> None:
    table = {"model.embed_tokens.weight": ("BF16", (151936, 4096))}
    path = write_headers(tmp_path / "qwen_3_8b.safetensors", {**published["text_encoder"], **table})
    with raises_with(CheckpointError, path, "Qwen3-8B", 4096, 2560, "Qwen3-4B"):
        files = SingleFiles(wide.transformer, path, wide.vae)
        Checkpoint.open(tmp_path, files, OpenOptions(allow_pruned=True))


def test_a_directory_of_omni(single_files_model: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ZImageOmniPipeline"}))
    with raises_with(CheckpointError, tmp_path / "model_index.json", "Omni", "Edit"):
        Checkpoint.open(tmp_path)


# --- quantized for other libraries ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "what"),
    [
        ("layers.0.attention.to_qkv.wscales", "BF16", "SVDQuant"),
        ("layers.0.attention.to_qkv.proj_down", "BF16", "nunchaku"),
        ("layers.0.attention.to_q.weight.quant_state.bitsandbytes__nf4", "U8", "bitsandbytes"),
        ("layers.0.attention.to_q.weight.absmax", "U8", "bitsandbytes"),
        ("layers.0.attention.to_q.SCB", "F32", "bitsandbytes"),
        ("layers.0.attention.to_q.svd_up", "BF16", "SDNQ"),
        ("layers.0.attention.to_q.weight._data", "I8", "quanto"),
        ("layers.0.attention.to_q.weight_qdata", "I8", "torchao"),
        ("layers.0.attention.to_q.qweight", "I32", "AWQ"),
        ("layers.0.attention.to_q.weight_codebook", "F32", "W4A8"),
        ("layers.0.attention.to_q.weight_scale_inv", "F32", "128 x 128"),
    ],
)
def test_forms_that_are_not_served(name: str, dtype: str, what: str, tmp_path: Path) -> None:
    path = write_headers(tmp_path / "a.safetensors", {name: (dtype, (2, 2))})
    with raises_with(CheckpointError, path, what, name, "GGUF"):
        Weights.in_file("transformer", path)


@pytest.mark.parametrize(
    ("format", "reason"), [("convrot_w4a4", "W4A4"), ("asym_w4a8_int8", "W4A8"), ("float8_new", "does not know")]
)
def test_formats_that_are_not_served(format: str, reason: str, tmp_path: Path) -> None:
    tensors = {f"{QKV}.weight": torch.zeros(4, 4, dtype=torch.int8), f"{QKV}.comfy_quant": as_bytes({"format": format})}
    save_file(tensors, tmp_path / "a.safetensors")
    with raises_with(CheckpointError, tmp_path / "a.safetensors", f"{QKV}.weight", format, reason):
        Weights.in_file("transformer", tmp_path / "a.safetensors")


def test_metadata_of_another_library(tmp_path: Path) -> None:
    for said, what in (({"method": "svdquant", "rank": 32}, "svdquant"), ({"quant_method": "sdnq"}, "sdnq")):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"quantization_config": json.dumps(said)})
        with raises_with(CheckpointError, tmp_path / "a.safetensors", what, "not supported"):
            Weights.in_file("transformer", tmp_path / "a.safetensors")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_directory_says_in_its_configuration_that_it_is_quantized(
    part: str, single_files_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(single_files_model, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    path = copy / part / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "sdnq", "weights_dtype": "uint4"}}
    path.write_text(json.dumps(config))
    with raises_with(CheckpointError, path, "quantization_config", "sdnq"):
        Checkpoint.open(copy)


# --- quantized tensors that lack something ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A file of one layer in a form, with something wrong."""

    form: str
    change: Callable[[Tensors], Tensors]
    facts: list[str] = field(default_factory=list)
    prefix: str | None = None  # of the older marker


def drop(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: value for name, value in t.items() if not name.endswith(ends)}


def put(end: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: value(tensor) if name.endswith(end) else tensor for name, tensor in t.items()}


BROKEN = {
    "old fp8 without its scale": Broken("old scaled fp8", drop("scale_weight"), [f"{QKV}.scale_weight"], ""),
    "old fp8 with a scale of another layer": Broken(
        "old scaled fp8", put("scale_weight", lambda s: s.new_ones(7)), [f"{QKV}.scale_weight", "[7]"], ""
    ),
    "an old marker of another type": Broken(
        "old scaled fp8", lambda t: {**t, "scaled_fp8": torch.zeros(1, dtype=torch.int32)}, ["scaled_fp8", "I32"]
    ),
    "a marked fp8 weight without its scale": Broken(
        "comfy fp8 e4m3", drop("weight_scale"), [f"{QKV}.weight", f"{QKV}.weight_scale"]
    ),
    "a marked fp8 weight in bf16": Broken(
        "comfy fp8 e4m3", put(".weight", lambda w: w.float().bfloat16()), [f"{QKV}.weight", "float8_e4m3fn", "BF16"]
    ),
    "a marker without its weight": Broken("comfy fp8 e4m3", drop(".weight"), [QKV, f"{QKV}.weight"]),
    "a scale without its weight": Broken("scaled fp8 without a marker", drop(".weight"), [f"{QKV}.weight_scale"]),
    "bytes with a scale and no marker": Broken(
        "comfy fp8 in bytes", drop("comfy_quant"), [f"{QKV}.weight", "U8", f"{QKV}.comfy_quant"]
    ),
    "a marker that is no JSON": Broken(
        "comfy fp8 e4m3", put("comfy_quant", lambda m: m[:5].clone()), [f"{QKV}.comfy_quant", "JSON"]
    ),
    "a marker without a format": Broken(
        "comfy fp8 e4m3", put("comfy_quant", lambda m: as_bytes({"a": 1})), [f"{QKV}.comfy_quant", "format"]
    ),
    "nvfp4 without its block scales": Broken("nvfp4", drop("weight_scale"), [f"{QKV}.weight", f"{QKV}.weight_scale"]),
    "nvfp4 without its second scale": Broken(
        "nvfp4", drop("weight_scale_2"), [f"{QKV}.weight", f"{QKV}.weight_scale_2"]
    ),
    "nvfp4 with scales that were not padded": Broken(
        "nvfp4", put("weight_scale", lambda s: s[:96].contiguous()), [f"{QKV}.weight_scale", "nvfp4"]
    ),
    "mxfp8 with float scales": Broken(
        "mxfp8", put("weight_scale", lambda s: s.float()), [f"{QKV}.weight_scale", "F32", "mxfp8"]
    ),
    "int8 without its scale": Broken("int8 per row", drop("weight_scale"), [f"{QKV}.weight", f"{QKV}.weight_scale"]),
    "int8 rotated in groups that do not fit": Broken(
        "int8 per row",
        put("comfy_quant", lambda m: as_bytes({"format": "int8_tensorwise", "convrot": True})),
        [f"{QKV}.weight", "256", "rotated"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_quantized_tensor_that_lacks_something_is_named(what: str, tmp_path: Path) -> None:
    broken = BROKEN[what]
    tensors = comfy_tensors({f"{QKV}.weight": WRITERS[broken.form](torch.randn(96, 64))})
    if broken.prefix is not None:
        tensors[f"{broken.prefix}scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    path = tmp_path / "a.safetensors"
    save_file(broken.change(tensors), path)
    with raises_with(CheckpointError, path, *broken.facts):
        Weights.in_file("transformer", path)


@pytest.mark.parametrize(
    ("form", "end", "value"),
    [
        ("comfy fp8 e4m3", ".weight", lambda w: torch.full_like(w, float("nan"))),
        ("comfy fp8 e4m3", ".weight_scale", lambda s: torch.full_like(s, float("nan"))),
        ("int8 per row", ".weight_scale", lambda s: torch.full_like(s, float("inf"))),
        ("nvfp4", ".weight_scale_2", lambda s: torch.full_like(s, float("nan"))),
        ("mxfp8", ".weight_scale", lambda s: torch.full_like(s, 255)),
    ],
)
def test_values_that_are_no_numbers_are_named(
    form: str,
    end: str,
    value: Callable[[torch.Tensor], torch.Tensor],
    stored: dict[str, Tensors],
    tmp_path: Path,
) -> None:
    tensors = to_comfy_transformer(stored["transformer"])
    name = f"{QKV}.weight"
    quantized = comfy_tensors({name: WRITERS[form](tensors.pop(name).float())})
    save_file(tensors | put(end, value)(quantized), tmp_path / "a.safetensors")
    weights = Weights.in_file("transformer", tmp_path / "a.safetensors")
    with raises_with(CheckpointError, tmp_path / "a.safetensors", "not finite"):
        weights.get("layers.0.attention.to_k.weight").read()


def test_integers_without_a_scale_are_not_numbers(stored: dict[str, Tensors], tmp_path: Path) -> None:
    tensors = to_comfy_transformer(stored["transformer"])
    tensors[f"{QKV}.weight"] = tensors[f"{QKV}.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights.in_file("transformer", tmp_path / "a.safetensors")
    with raises_with(CheckpointError, tmp_path / "a.safetensors", "layers.0.attention.to_k.weight", "I8", "scale"):
        weights.get("layers.0.attention.to_k.weight")


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_vae(stored: dict[str, Tensors], tmp_path: Path) -> Path:
    vae = {name: (value.float().numpy(), "F32") for name, value in to_ldm_vae(stored["vae"]).items()}
    write_gguf(tmp_path / "vae.gguf", vae)
    assert Weights.in_file("vae", tmp_path / "vae.gguf").names()
    return tmp_path / "vae.gguf"


def test_a_truncated_gguf_file(gguf_vae: Path) -> None:
    content = gguf_vae.read_bytes()
    for length in (5, 12, 40, 1000, len(content) - 100):
        gguf_vae.write_bytes(content[:length])
        with raises_with(CheckpointError, gguf_vae, "truncated"):
            Weights.in_file("vae", gguf_vae)


def test_a_damaged_gguf_file(gguf_vae: Path) -> None:
    content = bytearray(gguf_vae.read_bytes())
    for start, stop in ((8, 16), (16, 24)):  # the numbers of tensors and of keys
        damaged = content.copy()
        damaged[start:stop] = b"\xff" * (stop - start)
        gguf_vae.write_bytes(damaged)
        with raises_with(CheckpointError, gguf_vae, "GGUF", "tensors"):
            Weights.in_file("vae", gguf_vae)


def test_gguf_integers_are_not_weights(tmp_path: Path, stored: dict[str, Tensors]) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "none")
    for name, value in to_ldm_vae(stored["vae"]).items():
        array = value.float().numpy()
        writer.add_tensor(name, array.astype(np.int8) if name == "decoder.conv_out.bias" else array)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with raises_with(CheckpointError, tmp_path / "a.gguf", "decoder.conv_out.bias", "I8"):
        Weights.in_file("vae", tmp_path / "a.gguf").get("decoder.conv_out.bias")
