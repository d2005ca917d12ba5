"""Whole files in the forms that people have: every tensor, and the image against diffusers on the dequantized weights.

One image covers many forms: each layer is stored in another one.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from form_images import CASE, QUIET, as_diffusers, form_checkpoint, form_states, with_weights
from form_writers import GGUF_WRITTEN, MIXED, WRITERS, Written, old_fp8, write_comfy, write_gguf
from parity import check_parity, draw, draw_with_diffusers, open_with_diffusers
from single_file_tools import PARTS, Tensors, prefixed, to_comfy_transformer, to_ldm_vae

from zimage_export.build import BuildOptions, build
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.source.single_files import SingleFiles
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.tensors import DType, read_header
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return form_checkpoint(tmp_path_factory.mktemp("forms") / "model")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    return open_with_diffusers(model)


@pytest.fixture(scope="module")
def states(model: Path) -> dict[str, Tensors]:
    return form_states(model)


@pytest.fixture(scope="module")
def rest(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint without weights."""
    out = tmp_path_factory.mktemp("rest") / "rest"
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    return out


def assert_image_is_that_of(values: dict[str, Tensors], bundle: Path, pipeline: Any) -> None:
    with Pipeline.from_bundle(bundle, executor="cpu") as ours:
        found = draw(ours, CASE)[0]
    check_parity(found, draw_with_diffusers(with_weights(pipeline, values), CASE))


def assert_tensors_are(values: dict[str, Tensors], opened: Checkpoint) -> None:
    for part, state in values.items():
        weights = opened.weights(part)
        for name, value in state.items():
            found = weights.get(name.removeprefix("model."), tuple(value.shape)).read()
            np.testing.assert_allclose(found, value.numpy(), rtol=0, atol=2e-6, err_msg=name)


def quantize_each(tensors: Tensors, forms: list[str]) -> tuple[dict[str, Written], Tensors, Tensors]:
    """The linears of the blocks, each in the next form; the tensors that stay; and what all of them mean."""
    written: dict[str, Written] = {}
    for name, value in tensors.items():
        if value.ndim == 2 and name.endswith(".weight") and ("layers." in name or "refiner." in name):
            form = forms[len(written) % len(forms)]
            written[name] = WRITERS[form](value) if form in WRITERS else old_fp8()(value)
    others = {name: value.bfloat16() for name, value in tensors.items() if name not in written}
    values = {name: value.float() for name, value in others.items()}
    return written, others, values | {name: one.values for name, one in written.items()}


def test_comfyui_files_with_every_form(
    model: Path, rest: Path, states: dict[str, Tensors], pipeline: Any, tmp_path: Path
) -> None:
    """The transformer in all new forms, with a prefix and pads of one axis; the text encoder in the older fp8."""
    written, others, values = quantize_each(to_comfy_transformer(states["transformer"]), MIXED)
    assert {form for form, _ in zip(MIXED, written, strict=False)} == set(MIXED), "too few layers for all forms"
    others |= {name: others[name][0] for name in ("x_pad_token", "cap_pad_token")}
    others["norm_final.weight"] = torch.zeros(384)
    prefix = "model.diffusion_model."
    transformer = write_comfy(
        tmp_path / "z_image_turbo_mixed.sft",
        {prefix + name: one for name, one in written.items()},
        prefixed(prefix, others),
    )
    encoded, kept, meant = quantize_each(states["text_encoder"], ["older"])
    kept["lm_head.weight"] = torch.zeros(2, 2)
    text = write_comfy(tmp_path / "qwen_3_4b_fp8_scaled.safetensors", encoded, kept, old_prefix="")

    expected = {"transformer": as_diffusers(values), "text_encoder": meant}
    shutil.copytree(model / "vae", rest / "vae", dirs_exist_ok=True)
    files = SingleFiles(transformer, text)
    assert_tensors_are(expected, Checkpoint.open(rest, files))
    build(rest, tmp_path / "out", BuildOptions(files=files), QUIET)
    assert_image_is_that_of(expected, tmp_path / "out", pipeline)


def llama_name(name: str) -> str:
    """llama.cpp's name for a tensor of Qwen3, by its own converter's table."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 8)
    found = table.get_name(name, (".weight",))
    assert found, name
    return found


def test_gguf_files_of_all_components(rest: Path, states: dict[str, Tensors], pipeline: Any, tmp_path: Path) -> None:
    """The transformer with fused names, the text encoder with llama.cpp's, the VAE with its own; int8 from them."""
    kinds = [kind for kind in GGUF_WRITTEN if kind != "F16"]

    def typed(tensors: Tensors) -> dict[str, tuple[np.ndarray, str]]:
        found = {}
        for number, (name, value) in enumerate(tensors.items()):
            blocks = value.ndim == 2 and value.shape[-1] % 32 == 0
            kind = kinds[number % len(kinds)] if blocks else "F16" if value.ndim == 4 else "F32"
            found[name] = (value.numpy(), kind)
        return found

    paths = [tmp_path / f"{part}.gguf" for part in PARTS]
    comfy = to_comfy_transformer(states["transformer"])
    comfy |= {name: comfy[name][0] for name in ("x_pad_token", "cap_pad_token")}
    transformer = write_gguf(paths[0], typed(comfy), "lumina2")
    renamed = {llama_name(name): value for name, value in states["text_encoder"].items()}
    keys = {"qwen3.block_count": 4, "qwen3.rope.freq_base": 1e6, "qwen3.attention.layer_norm_rms_epsilon": 1e-6}
    text = write_gguf(paths[1], typed(renamed), "qwen3", keys)
    vae = write_gguf(paths[2], typed(to_ldm_vae(states["vae"])))

    values = {name: torch.from_numpy(value.copy()) for name, value in transformer.items()}
    values |= {name: values[name][None] for name in ("x_pad_token", "cap_pad_token")}
    back = {llama_name(name): name for name in states["text_encoder"]}
    expected = {
        "transformer": as_diffusers(values),
        "text_encoder": {back[name]: torch.from_numpy(value.copy()) for name, value in text.items()},
        "vae": {
            name: torch.from_numpy(vae[theirs].copy()).reshape(states["vae"][name].shape)
            for name, theirs in ldm_names(states["vae"]).items()
        },
    }
    files = SingleFiles(*paths)
    assert_tensors_are(expected, Checkpoint.open(rest, files))
    build(rest, tmp_path / "out", BuildOptions(files=files), QUIET)
    assert_image_is_that_of(expected, tmp_path / "out", pipeline)

    smaller = build(rest, tmp_path / "int8", BuildOptions(Precision.INT8, files=files), QUIET)
    assert_embeddings_are(smaller, expected["text_encoder"]["model.embed_tokens.weight"])


def ldm_names(vae: Tensors) -> dict[str, str]:
    """The original autoencoder's name for each of the VAE's tensors."""
    return {name: next(iter(to_ldm_vae({name: value}))) for name, value in vae.items()}


def assert_embeddings_are(bundle: Bundle, values: torch.Tensor) -> None:
    """Quantized embeddings are stored in fp16 where the bundle is not float32."""
    from zimage_runtime.bundle.tensors import TensorFile

    path = bundle.file(bundle.manifest.embeddings)
    (entry,) = read_header(path).values()
    assert entry.dtype == DType.F16
    stored, _ = TensorFile(path).array("embed_tokens.weight")
    np.testing.assert_allclose(stored.astype(np.float32), values.numpy(), rtol=1e-3, atol=1e-6)
