"""The same checkpoint in the shapes that it is found in: prefixed or not, in shards or in one file, in other types."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_export.source.checkpoint import Checkpoint
from zimage_export.synthetic.checkpoint import SMALL, write_checkpoint
from zimage_runtime.model.programs import COMPONENTS


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def read_all(root: Path) -> dict[str, np.ndarray]:
    """Every tensor of every component in float32."""
    opened = Checkpoint.open(root)
    return {
        f"{component}/{name}": opened.weights(component).get(name).read()
        for component in COMPONENTS
        for name in opened.weights(component).names()
    }


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = read_all(found), read_all(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def merge(folder: Path) -> dict[str, torch.Tensor]:
    """Takes the shards of a folder out of it and returns their tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
        path.unlink()
    for path in folder.glob("*.index.json"):
        path.unlink()
    return tensors


def test_values_are_the_ones_that_safetensors_reads(checkpoint: Path) -> None:
    found = read_all(checkpoint)
    count = 0
    for component in COMPONENTS:
        for path in (checkpoint / component).glob("*.safetensors"):
            for name, value in load_file(path).items():
                ours = found[f"{component}/{name.removeprefix('model.')}"]
                np.testing.assert_array_equal(ours, value.float().numpy(), err_msg=name)
                count += 1
    assert count == len(found)


def test_the_layout_is_the_published_one(checkpoint: Path) -> None:
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = json.loads((checkpoint / part / f"{stem}.safetensors.index.json").read_text("utf-8"))
        shards = {f"{stem}-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
        assert set(index["weight_map"].values()) == shards
        assert {path.name for path in (checkpoint / part).glob("*.safetensors")} == shards
    assert (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_one_file_instead_of_shards(part: str, copy: Path, checkpoint: Path) -> None:
    tensors = merge(copy / part)
    save_file(tensors, copy / part / "model.safetensors")
    assert_same_weights(copy, checkpoint)


def test_text_encoder_without_the_prefix(copy: Path, checkpoint: Path) -> None:
    tensors = merge(copy / "text_encoder")
    assert all(name.startswith("model.") for name in tensors)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(bare, copy / "text_encoder" / "model.safetensors")
    assert_same_weights(copy, checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_floating_type(dtype: torch.dtype, copy: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in merge(copy / "transformer").items()}
    save_file(tensors, copy / "transformer" / "model.safetensors")
    found = read_all(copy)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[f"transformer/{name}"], value.float().numpy())


def test_a_tensor_in_pieces_is_the_tensor(checkpoint: Path) -> None:
    source = Checkpoint.open(checkpoint).transformer.get("layers.0.attention.to_q.weight")
    pieces = list(source.chunks(max_bytes=1000))
    assert len(pieces) > 10
    assert max(piece.nbytes for piece in pieces) <= 1000
    np.testing.assert_array_equal(np.concatenate(pieces).reshape(source.shape), source.read())


def test_synthetic_weights_depend_on_the_seed_alone(checkpoint: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_checkpoint(tmp_path / str(seed), SMALL, seed=seed)
    assert_same_weights(tmp_path / "0", checkpoint)
    first, second = read_all(tmp_path / "0"), read_all(tmp_path / "1")
    assert not any(np.array_equal(value, second[name]) for name, value in first.items())
