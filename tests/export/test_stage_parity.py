"""Each stage alone against the class that it restates: transformers' Qwen3, diffusers' transformer and VAE, torch.

The whole image hides where a difference comes from, and forgives small ones; these do not.
"""

import shutil
from copy import deepcopy as copy_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import relative_error
from sessions import session

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.tensors import read_header
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.executors.protocol import Conditioning
from zimage_runtime.model.geometry import (
    ImageGeometry,
    Rotary,
    caption_positions,
    image_geometry,
    image_positions,
    padded,
    text_rotary,
    transformer_rotary,
)
from zimage_runtime.model.programs import Program
from zimage_runtime.model.schedule import make_schedule
from zimage_runtime.pipeline import Pipeline, to_image

pytestmark = pytest.mark.deep

TOLERANCE = 1e-5  # relative; float32 rounding comes to a few 1e-7 a layer

CAPTIONS = [1, 31, 32, 33, 100, 512]


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle)


def normal(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def run(pipeline: Pipeline, program: Program, **feeds: FloatArray) -> dict[str, FloatArray]:
    return HostPrograms(pipeline.bundle).run(program, feeds)


# Text encoder


def reference_hidden_states(diffusers_pipeline: Any, ids: list[int]) -> FloatArray:
    with torch.no_grad():
        outputs = diffusers_pipeline.text_encoder(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return outputs.hidden_states[-2].numpy()


@pytest.mark.parametrize("tokens", CAPTIONS)
def test_hidden_states(pipeline: Pipeline, diffusers_pipeline: Any, tokens: int) -> None:
    config = pipeline.bundle.manifest.config.text_encoder
    ids = np.random.default_rng(tokens).integers(0, config.vocab_size, tokens).tolist()
    found = session(pipeline).encode_text(pipeline.embed(ids), text_rotary(tokens, config))
    assert relative_error(found, reference_hidden_states(diffusers_pipeline, ids)) < TOLERANCE


def test_embeddings_are_the_rows_of_the_table(pipeline: Pipeline, diffusers_pipeline: Any) -> None:
    table = diffusers_pipeline.text_encoder.get_input_embeddings().weight.detach().numpy()
    ids = [0, 5, 319, 5]
    np.testing.assert_array_equal(pipeline.embed(ids)[0], table[ids])


# Caption


def caption_rotary(pipeline: Pipeline, tokens: int) -> Rotary:
    return transformer_rotary(caption_positions(padded(tokens)), pipeline.bundle.manifest.config.transformer)


def reference_caption(transformer: Any, hidden: FloatArray) -> FloatArray:
    """What leaves the last context refiner in a whole forward."""
    caught = []
    hook = transformer.context_refiner[-1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        with torch.no_grad():
            latents = torch.zeros(transformer.in_channels, 1, 4, 4)
            transformer([latents], torch.tensor([0.5]), [torch.from_numpy(hidden[0])])
    finally:
        hook.remove()
    return caught[0].numpy()


@pytest.mark.parametrize("tokens", CAPTIONS)
def test_caption_tokens(pipeline: Pipeline, diffusers_pipeline: Any, tokens: int) -> None:
    hidden = normal(1, tokens, pipeline.bundle.manifest.config.transformer.cap_feat_dim)
    rotary = caption_rotary(pipeline, tokens)
    found = run(pipeline, Program.CAPTION, hidden_states=hidden, cos=rotary.cos, sin=rotary.sin)["caption"]
    assert found.shape[1] == padded(tokens)
    assert relative_error(found, reference_caption(diffusers_pipeline.transformer, hidden)) < TOLERANCE


# Modulation


def test_modulation_table(pipeline: Pipeline, diffusers_pipeline: Any) -> None:
    """Rows as the contract has them: 1 + scale and tanh(gate), each times the weight of the norm that it follows."""
    transformer = diffusers_pipeline.transformer
    timesteps = np.concatenate([make_schedule(8, pipeline.bundle.manifest.config.scheduler).timesteps, [0.5, 1.0]])
    timesteps = timesteps.astype(np.float32)
    found = run(pipeline, Program.MODULATION, timesteps=timesteps)
    with torch.no_grad():
        embedding = transformer.t_embedder(torch.from_numpy(timesteps) * transformer.t_scale)
        blocks = []
        for block in [*transformer.noise_refiner, *transformer.layers]:
            scale_attention, gate_attention, scale_ffn, gate_ffn = block.adaLN_modulation(embedding).chunk(4, dim=1)
            rows = [
                (1 + scale_attention) * block.attention_norm1.weight,
                gate_attention.tanh() * block.attention_norm2.weight,
                (1 + scale_ffn) * block.ffn_norm1.weight,
                gate_ffn.tanh() * block.ffn_norm2.weight,
            ]
            blocks.append(torch.stack(rows, dim=1))
        final = 1 + transformer.all_final_layer["2-1"].adaLN_modulation(embedding)
    assert relative_error(found["modulation"], torch.stack(blocks, dim=1).numpy()) < TOLERANCE
    assert relative_error(found["final_scale"], final.numpy()) < TOLERANCE


# Denoiser


def reference_velocity(transformer: Any, latents: FloatArray, timestep: float, hidden: FloatArray) -> FloatArray:
    """diffusers' transformer takes lists of images with a frame axis; its pipeline negates what comes out."""
    images = [torch.from_numpy(one)[:, None] for one in latents]
    captions = [torch.from_numpy(hidden[0])] * len(images)
    with torch.no_grad():
        outputs = transformer(images, torch.full((len(images),), timestep), captions, return_dict=False)[0]
    return -torch.stack(outputs).squeeze(2).numpy()


def geometry_of(pipeline: Pipeline, width: int, height: int) -> ImageGeometry:
    return image_geometry(width, height, pipeline.bundle.manifest.config)


@pytest.mark.parametrize(
    ("size", "tokens", "batch"),
    [((64, 64), 20, 1), ((80, 112), 33, 1), ((16, 16), 1, 1), ((176, 48), 64, 2), ((112, 80), 500, 2)],
)
def test_one_step(pipeline: Pipeline, diffusers_pipeline: Any, size: tuple[int, int], tokens: int, batch: int) -> None:
    config = pipeline.bundle.manifest.config
    geometry = geometry_of(pipeline, *size)
    hidden = normal(1, tokens, config.transformer.cap_feat_dim)
    timesteps = np.array([0.0, 0.3, 0.7], dtype=np.float32)
    image = transformer_rotary(image_positions(geometry, padded(tokens)), config.transformer)
    conditioning = Conditioning(hidden, timesteps, image, caption_rotary(pipeline, tokens))
    denoiser = session(pipeline).denoiser(conditioning)
    latents = normal(batch, config.vae.latent_channels, geometry.latent_height, geometry.latent_width, seed=1)
    for step, timestep in enumerate(timesteps):
        expected = reference_velocity(diffusers_pipeline.transformer, latents, float(timestep), hidden)
        assert relative_error(denoiser(latents, step), expected) < TOLERANCE


# Autoencoder

# width and height of the image, images in the batch
IMAGES = [(64, 64, 1), (48, 112, 1), (176, 16, 2)]


@pytest.mark.parametrize(("width", "height", "batch"), IMAGES)
def test_decode(pipeline: Pipeline, diffusers_pipeline: Any, width: int, height: int, batch: int) -> None:
    vae = diffusers_pipeline.vae
    latents = normal(batch, vae.config.latent_channels, height // 8, width // 8)
    found = session(pipeline).decode(latents)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents)).sample.numpy()
    assert found.shape == (batch, 3, height, width)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(("width", "height", "batch"), IMAGES)
def test_encode(pipeline: Pipeline, diffusers_pipeline: Any, width: int, height: int, batch: int) -> None:
    image = np.tanh(normal(batch, 3, height, width))
    mean, logvar = session(pipeline).encode(image)
    with torch.no_grad():
        distribution = diffusers_pipeline.vae.encode(torch.from_numpy(image)).latent_dist
    assert mean.shape == (batch, 16, height // 8, width // 8)
    assert relative_error(mean, distribution.mean.numpy()) < TOLERANCE
    assert relative_error(logvar, distribution.logvar.numpy()) < TOLERANCE


def test_encode_clamps_the_log_variance(bundle: Path, diffusers_pipeline: Any, tmp_path: Path) -> None:
    """No image drives random weights that far, so the last bias does, on both sides."""
    bias = np.tile(np.linspace(-60, 60, 16, dtype=np.float32), 2)
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    path = copy / "vae" / "weights.safetensors"
    with path.open("r+b") as file:
        file.seek(read_header(path)["encoder.conv_out.bias"].offset)
        file.write(bias.tobytes())
    vae = copy_module(diffusers_pipeline.vae)  # others use the pipeline after this
    vae.encoder.conv_out.bias = torch.nn.Parameter(torch.from_numpy(bias))
    image = np.tanh(normal(1, 3, 32, 48))
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(image)).latent_dist.logvar.numpy()
    assert (expected.min(), expected.max()) == (-30, 20)
    _, found = session(Pipeline.from_bundle(copy)).encode(image)
    assert relative_error(found, expected) < TOLERANCE
    assert (found.min(), found.max()) == (-30, 20)


def test_pixels_are_rounded_as_diffusers_rounds(diffusers_pipeline: Any) -> None:
    """Every step of 1/1000 of the decoder's range and beyond it, halves between two pixel values included."""
    values = np.concatenate([np.linspace(-1.2, 1.2, 2401), (np.arange(256) + 0.5) / 127.5 - 1]).astype(np.float32)
    values = np.resize(values, (3, 32, 32))
    (expected,) = diffusers_pipeline.image_processor.postprocess(torch.from_numpy(values)[None], output_type="pil")
    np.testing.assert_array_equal(np.asarray(to_image(values)), np.asarray(expected))


# Rotary tables and positions


@pytest.mark.parametrize(("size", "tokens"), [((64, 64), 20), ((80, 112), 33), ((1024, 16), 512)])
def test_positions_and_tables_of_the_transformer(
    pipeline: Pipeline, diffusers_pipeline: Any, size: tuple[int, int], tokens: int
) -> None:
    transformer, config = diffusers_pipeline.transformer, pipeline.bundle.manifest.config.transformer
    geometry = geometry_of(pipeline, *size)
    latents = torch.zeros(config.in_channels, 1, geometry.latent_height, geometry.latent_width)
    hidden = torch.zeros(tokens, config.cap_feat_dim)
    prepared = transformer.patchify_and_embed([latents], [hidden], 2, 1)
    image_ids, caption_ids = prepared[3][0], prepared[4][0][: padded(tokens)]
    ours = {"image": image_positions(geometry, padded(tokens)), "caption": caption_positions(padded(tokens))}
    for positions, ids in zip(ours.values(), (image_ids, caption_ids), strict=True):
        np.testing.assert_array_equal(positions, ids.numpy())
        expected = transformer.rope_embedder(ids)
        found = transformer_rotary(positions, config)
        np.testing.assert_allclose(found.cos[0], expected.real.numpy(), rtol=0, atol=2e-7)
        np.testing.assert_allclose(found.sin[0], expected.imag.numpy(), rtol=0, atol=2e-7)


def test_tables_of_the_text_encoder(pipeline: Pipeline, diffusers_pipeline: Any) -> None:
    encoder = diffusers_pipeline.text_encoder
    rotary = next(module for name, module in encoder.named_modules() if name.endswith("rotary_emb"))
    cos, sin = rotary(torch.zeros(1, 512, 1), torch.arange(512)[None])
    found = text_rotary(512, pipeline.bundle.manifest.config.text_encoder)
    half = found.cos.shape[2]
    assert cos.shape[2] == 2 * half  # transformers has every angle twice
    np.testing.assert_allclose(found.cos, cos[..., :half].numpy(), rtol=0, atol=5e-5)
    np.testing.assert_allclose(found.sin, sin[..., :half].numpy(), rtol=0, atol=5e-5)
