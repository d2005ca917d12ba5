"""ComfyUI's single files give what the directory gives, byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from facts import raises_with
from safetensors.torch import load_file, save_file
from single_file_tools import (
    PARTS,
    Tensors,
    assert_same,
    prefixed,
    to_comfy_transformer,
    to_ldm_vae,
    weight_hashes,
)

from zimage_export.build import BuildOptions, build
from zimage_export.cli import cli
from zimage_export.errors import CheckpointError
from zimage_export.graphs import build_graphs
from zimage_export.source.checkpoint import Checkpoint, OpenOptions
from zimage_export.source.single_files import SingleFiles
from zimage_export.source.weights import Weights
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.command_line.console import run_command
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VaeConfig

pytestmark = pytest.mark.deep

PRUNED = OpenOptions(allow_pruned=True)
"""For files of the published widths with fewer layers."""

# --- what the files give ---------------------------------------------------------------------------------------------


def test_bundle_from_single_files_is_the_directorys(
    single_files_model: Path, comfy: SingleFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(single_files_model, tmp_path / "from-directory", BuildOptions(), Progress(quiet=True))
    rest = tmp_path / "rest"  # no transformer or text_encoder folder; the VAE's with its configuration only
    shutil.copytree(
        single_files_model, rest, ignore=shutil.ignore_patterns("transformer", "text_encoder", "*.safetensors")
    )

    out = tmp_path / "from-files"
    options = [f"--{part.replace('_', '-')}={comfy.get(part)}" for part in PARTS]
    status = run_command(cli, ["build", str(rest), str(out), "--quiet", *options])

    assert status == 0, capsys.readouterr().err
    assert weight_hashes(out) == weight_hashes(tmp_path / "from-directory")
    manifest = Bundle.open(out).manifest
    assert manifest.config == Checkpoint.open(single_files_model).config
    assert manifest.source.name == "my_finetune"


def test_bundle_from_a_single_file_is_verified_against_it(
    single_files_model: Path,
    comfy: SingleFiles,
    stored: dict[str, Tensors],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The reference must be the fine-tune, not the directory's own transformer, and needs no folder for it."""
    torch.set_num_threads(1)  # ten times faster at this size
    finetune = tmp_path / "finetune.safetensors"
    altered = {k: v * 1.5 if "feed_forward" in k else v for k, v in stored["transformer"].items()}
    save_file(to_comfy_transformer(altered), finetune)
    rest, out = tmp_path / "rest", tmp_path / "out"
    shutil.copytree(single_files_model, rest, ignore=shutil.ignore_patterns("transformer", "text_encoder"))
    files = ["--transformer", str(finetune), "--text-encoder", str(comfy.text_encoder)]

    assert run_command(cli, ["build", str(rest), str(out), *files, "--verify", "--quiet"]) == 0
    parity = Bundle.open(out).manifest.parity
    assert parity is not None
    assert parity["reference"].startswith("finetune ")
    again = ["verify", str(out), "--reference", str(single_files_model), "--quiet"]
    assert run_command(cli, [*again, *files]) == 0
    capsys.readouterr()
    assert run_command(cli, again) == 1
    assert "error" in capsys.readouterr().err


def test_finetune_needs_no_transformer_folder(single_files_model: Path, comfy: SingleFiles, tmp_path: Path) -> None:
    rest = tmp_path / "rest"
    shutil.copytree(single_files_model, rest, ignore=shutil.ignore_patterns("transformer"))
    opened = Checkpoint.open(rest, SingleFiles(transformer=comfy.transformer))
    assert opened.config == Checkpoint.open(single_files_model).config
    assert (opened.name, Checkpoint.open(single_files_model).name) == ("my_finetune", "base-model")


def test_directorys_configuration_wins(single_files_model: Path, comfy: SingleFiles, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(single_files_model, copy)
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
    prefix: str, single_files_model: Path, stored: dict[str, Tensors], tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(prefixed(prefix, to_ldm_vae(stored["vae"])), path)
    weights = Weights.in_file("vae", path)
    config = json.loads((single_files_model / "vae" / "config.json").read_text())
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


@pytest.fixture(scope="module", params=["folder/tokenizer", "folder", "file"])
def tokenizer(
    request: pytest.FixtureRequest, single_files_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What MODEL may be when every component has a file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    target = folder / "tokenizer" / "tokenizer.json" if "/" in request.param else folder / "tokenizer.json"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(single_files_model / "tokenizer" / "tokenizer.json", target)
    return target if request.param == "file" else folder


def test_published_configuration_is_read_off_three_files(wide: SingleFiles, tokenizer: Path) -> None:
    opened = Checkpoint.open(tokenizer, wide, PRUNED)
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


def test_published_files_hold_every_tensor_that_programs_use(wide: SingleFiles, single_files_model: Path) -> None:
    opened = Checkpoint.open(single_files_model / "tokenizer", wide, PRUNED)
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
    with raises_with(CheckpointError, path, f"{part}/config.json"):
        Checkpoint.open(rest, SingleFiles(**{part: path}))
