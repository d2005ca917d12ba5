"""ComfyUI's names for a checkpoint: diffusers' own converters, which go the other way, give the checkpoint back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from facts import raises_with
from safetensors.torch import load_file

from zimage_rt.bench.systems.comfyui_files import FILES, ConversionError, convert

pytestmark = pytest.mark.deep


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(checkpoint, tmp_path_factory.mktemp("comfyui"))


def original(checkpoint: Path, component: str) -> dict[str, torch.Tensor]:
    shards = sorted((checkpoint / component).glob("*.safetensors"))
    return {name: value for shard in shards for name, value in load_file(shard).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_transformer_comes_back(checkpoint: Path, converted: Path) -> None:
    tensors = load_file(converted / FILES["transformer"])
    assert "layers.0.attention.qkv.weight" in tensors
    assert "x_embedder.weight" in tensors
    assert_equal(convert_z_image_transformer_checkpoint_to_diffusers(tensors), original(checkpoint, "transformer"))


def test_the_vae_comes_back(checkpoint: Path, converted: Path, diffusers_pipeline: Any) -> None:
    tensors = load_file(converted / FILES["vae"])
    assert "decoder.up.3.block.0.conv1.weight" in tensors
    assert tensors["decoder.mid.attn_1.q.weight"].ndim == 4
    config = dict(diffusers_pipeline.vae.config)
    assert_equal(convert_ldm_vae_checkpoint(tensors, config), original(checkpoint, "vae"))


def test_the_text_encoder_keeps_its_names(checkpoint: Path, converted: Path) -> None:
    tensors = load_file(converted / FILES["text_encoder"])
    expected = original(checkpoint, "text_encoder")
    assert_equal(tensors, {n if n.startswith(("model.", "lm_head.")) else f"model.{n}": v for n, v in expected.items()})


def test_what_is_there_is_not_written_again(checkpoint: Path, converted: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in converted.iterdir()}
    convert(checkpoint, converted)
    assert {path.name: path.stat().st_mtime_ns for path in converted.iterdir()} == before


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "transformer").mkdir(parents=True)
    with raises_with(ConversionError, tmp_path / "checkpoint" / "transformer", "safetensors"):
        convert(tmp_path / "checkpoint", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
