"""ComfyUI's single files give what the directory gives, byte for byte; whatever else is one clear line."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from zimage_export.build import BuildOptions, build
from zimage_export.checkpoint import Checkpoint, Weights
from zimage_export.cli import cli
from zimage_export.errors import CheckpointError
from zimage_export.graphs import build_graphs
from zimage_export.single_files import SingleFiles
from zimage_export.synthetic import SMALL, Scale, write_checkpoint
from zimage_runtime.bundle import Bundle
from zimage_runtime.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from zimage_runtime.console import run_command
from zimage_runtime.progress import Progress
from zimage_runtime.tensors import read_header

Tensors = dict[str, torch.Tensor]

PUBLISHED_HEADS = replace(SMALL.config.transformer, dim=256, n_heads=2, n_layers=2, axes_dims=(32, 48, 48))
"""Narrow, but with heads of the published width, so that the configuration can be read off the shapes."""

PARTS = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "base-model"
    config = replace(SMALL.config, transformer=PUBLISHED_HEADS, vae=replace(SMALL.config.vae, sample_size=32))
    write_checkpoint(out, Scale(config))
    return out


@pytest.fixture(scope="module")
def stored(model: Path) -> dict[str, Tensors]:
    """The checkpoint's tensors by component, under diffusers' names."""
    return {
        part: {k: v for path in sorted((model / part).glob("*.safetensors")) for k, v in load_file(path).items()}
        for part in PARTS
    }


@pytest.fixture(scope="module")
def comfy(stored: dict[str, Tensors], tmp_path_factory: pytest.TempPathFactory) -> SingleFiles:
    """The same tensors in ComfyUI's files."""
    folder = tmp_path_factory.mktemp("comfy")
    paths = [folder / name for name in ("my_finetune.safetensors", "qwen_3_4b.safetensors", "ae.safetensors")]
    save_file(to_comfy_transformer(stored["transformer"]), paths[0])
    save_file({**stored["text_encoder"], "lm_head.weight": torch.zeros(2, 2)}, paths[1])
    save_file(to_ldm_vae(stored["vae"]), paths[2])
    return SingleFiles(*paths)


def to_comfy_transformer(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, value in tensors.items():
        if re.search(r"\.to_[qkv]\.weight$", name):
            scope = name.rpartition(".to_")[0]
            out[f"{scope}.qkv.weight"] = torch.cat([tensors[f"{scope}.to_{kind}.weight"] for kind in "qkv"])
            continue
        for theirs, comfys in (
            ("all_x_embedder.2-1", "x_embedder"),
            ("all_final_layer.2-1", "final_layer"),
            ("to_out.0", "out"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        ):
            name = name.replace(theirs, comfys)
        out[name] = value.clone()
    return out


def to_ldm_vae(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, value in tensors.items():
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", name)
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"(up|down)samplers\.0", r"\1sample", name)
        name = name.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])\.", r"\1.", name).replace("to_out.0", "proj_out")
            value = value[:, :, None, None] if value.ndim == 2 else value
        out[name] = value.clone()
    return out


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def assert_same(weights: Weights, expected: Mapping[str, torch.Tensor]) -> None:
    assert set(weights.names()) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(weights.get(name, tuple(value.shape)).read(), value.float().numpy(), name)


def weight_hashes(bundle: Path) -> dict[str, str]:
    files = Bundle.open(bundle).manifest.files
    return {path: record.sha256 for path, record in files.items() if path.endswith(".safetensors")}


def write_headers(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A safetensors file of the size it should have, without data in it."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * sizes.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


# --- what the files give ---------------------------------------------------------------------------------------------


def test_bundle_from_single_files_is_the_directorys(
    model: Path, comfy: SingleFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(model, tmp_path / "from-directory", BuildOptions(), Progress(quiet=True))
    rest = tmp_path / "rest"  # no transformer or text_encoder folder; the VAE's with its configuration only
    shutil.copytree(model, rest, ignore=shutil.ignore_patterns("transformer", "text_encoder", "*.safetensors"))

    out = tmp_path / "from-files"
    options = [f"--{part.replace('_', '-')}={comfy.get(part)}" for part in PARTS]
    status = run_command(cli, ["build", str(rest), str(out), "--quiet", *options])

    assert status == 0, capsys.readouterr().err
    assert weight_hashes(out) == weight_hashes(tmp_path / "from-directory")
    manifest = Bundle.open(out).manifest
    assert manifest.config == Checkpoint.open(model).config
    assert manifest.source.name == "my_finetune"


def test_bundle_from_a_single_file_is_verified_against_it(
    model: Path, comfy: SingleFiles, stored: dict[str, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference must be the fine-tune, not the directory's own transformer, and needs no folder for it."""
    torch.set_num_threads(1)  # ten times faster at this size
    finetune = tmp_path / "finetune.safetensors"
    altered = {k: v * 1.5 if "feed_forward" in k else v for k, v in stored["transformer"].items()}
    save_file(to_comfy_transformer(altered), finetune)
    rest, out = tmp_path / "rest", tmp_path / "out"
    shutil.copytree(model, rest, ignore=shutil.ignore_patterns("transformer", "text_encoder"))
    files = ["--transformer", str(finetune), "--text-encoder", str(comfy.text_encoder)]

    assert run_command(cli, ["build", str(rest), str(out), *files, "--verify", "--quiet"]) == 0
    parity = Bundle.open(out).manifest.parity
    assert parity is not None
    assert parity["reference"].startswith("finetune ")
    again = ["verify", str(out), "--reference", str(model), "--quiet"]
    assert run_command(cli, [*again, *files]) == 0
    capsys.readouterr()
    assert run_command(cli, again) == 1
    assert "error" in capsys.readouterr().err


def test_finetune_needs_no_transformer_folder(model: Path, comfy: SingleFiles, tmp_path: Path) -> None:
    rest = tmp_path / "rest"
    shutil.copytree(model, rest, ignore=shutil.ignore_patterns("transformer"))
    opened = Checkpoint.open(rest, SingleFiles(transformer=comfy.transformer))
    assert opened.config == Checkpoint.open(model).config
    assert (opened.name, Checkpoint.open(model).name) == ("my_finetune", "base-model")


def test_directorys_configuration_wins(model: Path, comfy: SingleFiles, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 128.0}))
    assert Checkpoint.open(copy, comfy).config.transformer.rope_theta == 128.0


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_transformer_names_are_those_of_diffusers_converter(
    prefix: str, stored: dict[str, Tensors], tmp_path: Path
) -> None:
    path = tmp_path / "transformer.safetensors"
    save_file(prefixed(prefix, to_comfy_transformer(stored["transformer"])), path)
    weights = Weights.in_file("transformer", path)
    assert_same(weights, convert_z_image_transformer_checkpoint_to_diffusers(load_file(path)))
    assert_same(weights, stored["transformer"])


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_vae_names_are_those_of_diffusers_converter(
    prefix: str, model: Path, stored: dict[str, Tensors], tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(prefixed(prefix, to_ldm_vae(stored["vae"])), path)
    weights = Weights.in_file("vae", path)
    config = json.loads((model / "vae" / "config.json").read_text())
    assert_same(weights, convert_ldm_vae_checkpoint(load_file(path), config))
    assert_same(weights, stored["vae"])


@pytest.mark.parametrize("part", PARTS)
def test_diffusers_names_are_taken_as_they_are(part: str, stored: dict[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "single.safetensors"
    tensors = {name.removeprefix("model."): value for name, value in stored[part].items()}
    save_file(tensors, path)
    assert_same(Weights.in_file(part, path), tensors)


def test_all_parts_in_one_file(stored: dict[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "all-in-one.safetensors"
    save_file(
        prefixed("model.diffusion_model.", to_comfy_transformer(stored["transformer"]))
        | prefixed("text_encoders.qwen3_4b.transformer.", stored["text_encoder"])
        | prefixed("vae.", to_ldm_vae(stored["vae"])),
        path,
    )
    for part in PARTS:
        expected = {name.removeprefix("model."): value for name, value in stored[part].items()}
        assert_same(Weights.in_file(part, path), expected)


# --- configurations read off the shapes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> SingleFiles:
    """Files of the published widths, fewer layers and no data, beside a tokenizer's folder."""
    folder = tmp_path_factory.mktemp("wide")
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(n_layers=3, n_refiner_layers=2)  # the defaults are the published sizes
        qwen = Qwen3Config(
            hidden_size=2560,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=9728,
            vocab_size=151936,
            tie_word_embeddings=True,
        )
        text_encoder = Qwen3ForCausalLM(qwen)
        vae = AutoencoderKL(
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    states = {
        "transformer": to_comfy_transformer(transformer.state_dict()),
        "text_encoder": text_encoder.state_dict(),
        "vae": to_ldm_vae(vae.state_dict()),
    }
    paths = {
        part: write_headers(folder / f"{part}.safetensors", {k: ("BF16", tuple(v.shape)) for k, v in state.items()})
        for part, state in states.items()
    }
    return SingleFiles(**paths)


@pytest.fixture(scope="module", params=["folder/tokenizer", "folder", "file"])
def tokenizer(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What MODEL may be when every component has a file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    target = folder / "tokenizer" / "tokenizer.json" if "/" in request.param else folder / "tokenizer.json"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(model / "tokenizer" / "tokenizer.json", target)
    return target if request.param == "file" else folder


def test_published_configuration_is_read_off_three_files(wide: SingleFiles, tokenizer: Path) -> None:
    opened = Checkpoint.open(tokenizer, wide)
    assert opened.tokenizer.is_file()
    assert opened.config.transformer == TransformerConfig(
        dim=3840,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=30,
        cap_feat_dim=2560,
        in_channels=16,
        norm_eps=1e-5,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=(32, 48, 48),
        axes_lens=(1536, 512, 512),
    )
    assert opened.config.text_encoder == TextEncoderConfig(
        hidden_size=2560,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    assert opened.config.vae == VaeConfig(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        sample_size=1024,
    )
    assert opened.config.scheduler == SchedulerConfig(shift=3.0, num_train_timesteps=1000)


def test_published_files_hold_every_tensor_that_programs_use(wide: SingleFiles, model: Path) -> None:
    opened = Checkpoint.open(model / "tokenizer", wide)
    for graph in build_graphs(opened.config):
        for name, shape in graph.weights.items():
            opened.weights(graph.program.component).get(name, shape)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_other_sizes_need_a_configuration(part: str, checkpoint: Path, tmp_path: Path) -> None:
    """A head's split between the axes, and a group norm's groups, leave no trace in the shapes."""
    rest = tmp_path / "rest"
    shutil.copytree(checkpoint, rest, ignore=shutil.ignore_patterns("config.json" if part == "vae" else part))
    tensors = [load_file(path) for path in (checkpoint / part).glob("*.safetensors")]
    path = tmp_path / "single.safetensors"
    save_file({name: value for shard in tensors for name, value in shard.items()}, path)
    if part == "vae":
        for other in ("transformer", "text_encoder"):
            shutil.copyfile(checkpoint / other / "config.json", rest / other / "config.json")
    with pytest.raises(CheckpointError, match=rf"{path}: .*published model's.*{part}/config\.json"):
        Checkpoint.open(rest, SingleFiles(**{part: path}))


# --- what is refused, and how ----------------------------------------------------------------------------------------


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
        ({"double_blocks.0.img_attn.qkv.weight": "BF16"}, "holds no Z-Image transformer .*x_pad_token"),
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
        ("page.safetensors", b"<!doctype html><title>Sign in</title>", "not a safetensors file"),
    ],
)
def test_other_formats_are_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}: {said}"):
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
    with pytest.raises(CheckpointError, match=f"{path}: holds a {titles[given]} where a {titles[wanted]} .* expected"):
        Weights.in_file(wanted, path)


def test_vae_of_another_model_is_refused(stored: dict[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "sdxl_vae.safetensors"
    save_file(to_ldm_vae(stored["vae"]) | {"post_quant_conv.weight": torch.zeros(4, 4, 1, 1)}, path)
    with pytest.raises(CheckpointError, match=f"{path}: has quant_conv"):
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
        (_drop_norm, r"holds no tensor layers\.1\.attention_norm1\.weight"),
        (_drop_qkv, r"holds no tensor layers\.1\.attention\.to_q\.weight"),
        (_narrow, r"layers\.1\.attention\.to_q\.weight has shape \[85, 256\], the configuration says \[256, 256\]"),
        (_fuse_badly, r"layers\.1\.attention\.qkv\.weight has shape \[256, 256\], which is not query, key and value"),
        (_add_layer, r"has n_layers 3, the configuration says 2|holds no tensor layers\.2\."),
    ],
)
def test_wrong_tensor_is_named_with_its_file(
    folder: str,
    alter: Callable[[Tensors], None],
    said: str,
    model: Path,
    stored: dict[str, Tensors],
    tmp_path: Path,
) -> None:
    tensors = to_comfy_transformer(stored["transformer"])
    alter(tensors)
    path = tmp_path / "finetune.safetensors"
    save_file(tensors, path)
    rest = tmp_path / folder
    shutil.copytree(model, rest, ignore=shutil.ignore_patterns(*(["transformer"] if folder == "without" else [])))
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
    part: str, name: str, shape: tuple[int, ...], wide: SingleFiles, model: Path, tmp_path: Path
) -> None:
    source = wide.get(part)
    assert source is not None
    tensors = {key: (entry.dtype, entry.shape) for key, entry in read_header(source).items()}
    path = write_headers(tmp_path / source.name, {**tensors, name: ("BF16", shape)})
    with pytest.raises(CheckpointError, match=rf"^{path}: .* has shape {re.escape(str(list(shape)))}"):
        Checkpoint.open(model / "tokenizer", replace(wide, **{part: path}))


def test_some_files_still_need_a_checkpoint(model: Path, wide: SingleFiles, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        Checkpoint.open(model / "tokenizer", replace(wide, vae=None))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: has no tokenizer\.json, which single files lack"):
        Checkpoint.open(tmp_path, wide)


def test_model_index_need_not_know_an_overridden_part(model: Path, comfy: SingleFiles, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    path = copy / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "transformer": [None, None], "vae": ["diffusers", "Other"]}))
    with pytest.raises(CheckpointError, match="vae 'Other' is not supported"):
        Checkpoint.open(copy, SingleFiles(transformer=comfy.transformer))
    assert Checkpoint.open(copy, replace(comfy, text_encoder=None)).name == "my_finetune"


def test_command_says_what_is_wrong_in_one_line(
    model: Path, comfy: SingleFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run_command(cli, ["build", str(model), str(tmp_path / "out"), "--transformer", str(comfy.vae)])
    lines = capsys.readouterr().err.splitlines()
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {comfy.vae}: holds a VAE where")
