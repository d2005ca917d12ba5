"""Decoding in tiles: the same image in less memory, chosen only where the decoder as one program does not fit."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_with
from sessions import session

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.tensors import TensorFile
from zimage_runtime.errors import MemoryLimitError
from zimage_runtime.executors.ort import cpu_plan as memory
from zimage_runtime.executors.ort.cpu_plan import MemoryPlan, plan_memory
from zimage_runtime.executors.protocol import Work
from zimage_runtime.model.geometry import ImageGeometry, image_geometry
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline, Request
from zimage_runtime.tiles.kernels import NumpyTileKernels
from zimage_runtime.tiles.tiling import TiledDecoder, TiledEncoder, tile_rows, tiled_bytes, tiled_encoder_bytes

TILE_VALUES = 1 << 13  # 2 rows of the largest map of a 128-pixel image of the small model: dozens of tiles


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle)


@pytest.fixture(scope="module")
def decoder(pipeline: Pipeline) -> TiledDecoder:
    manifest = pipeline.bundle.manifest
    weights = TensorFile(pipeline.bundle.file(manifest.weights["vae"]))
    return TiledDecoder(manifest.config.vae, weights, NumpyTileKernels(TILE_VALUES))


@pytest.fixture(scope="module")
def images(pipeline: Pipeline, decoder: TiledDecoder) -> tuple[FloatArray, FloatArray]:
    """One image [3, 128, 128] decoded as a whole and in tiles. Its latents are those of an image with edges."""
    y, x = np.mgrid[0:128, 0:128] / 128
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.where((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06, 0.8, -0.5)]
    latents, _ = session(pipeline).encode(np.stack(waves)[None].astype(np.float32))
    return session(pipeline).decode(latents)[0], decoder(latents)[0]


def psnr(found: FloatArray, expected: FloatArray) -> float:
    """In dB, of images in -1 to 1."""
    return float(10 * np.log10(4 / np.mean(np.square(found - expected, dtype=np.float64))))


def rows_between_tiles(pipeline: Pipeline) -> Iterator[int]:
    """The last rows of the tiles of the layers at full resolution."""
    widest = max(pipeline.bundle.manifest.config.vae.block_out_channels[:2])
    step = tile_rows(widest, 128, TILE_VALUES)
    return iter(range(step - 1, 127, step))


def test_the_image_is_the_whole_decoders(images: tuple[FloatArray, FloatArray]) -> None:
    whole, tiled = images
    assert whole.std() > 0.1
    assert psnr(tiled, whole) > 100  # the requirement is 45; a statistic of one tile instead of the map gives 20


def test_no_step_at_the_borders_of_tiles(pipeline: Pipeline, images: tuple[FloatArray, FloatArray]) -> None:
    whole, tiled = images
    borders = list(rows_between_tiles(pipeline))
    assert len(borders) > 10
    steps, own = (np.abs(np.diff(image, axis=1)) for image in (tiled, whole))
    assert steps[:, borders].max() <= own.max() + 1e-5  # the two sum in another order
    assert np.abs(steps - own)[:, borders].max() < 1e-4  # the image's own gradient, and nothing added


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 2, 22), (2, 6, 4), (1, 14, 2)])
@pytest.mark.parametrize("values", [1, 5000, 1 << 20])
def test_any_shape_batch_and_tile_size(
    pipeline: Pipeline, decoder: TiledDecoder, batch: int, height: int, width: int, values: int
) -> None:
    channels = pipeline.bundle.manifest.config.vae.latent_channels
    latents = np.random.default_rng(3).standard_normal((batch, channels, height, width), dtype=np.float32)
    kept = latents.copy()
    found, expected = replace(decoder, kernels=NumpyTileKernels(values))(latents), session(pipeline).decode(latents)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(latents, kept)


@pytest.mark.parametrize(
    ("batch", "height", "width", "values"),
    [(1, 16, 176, 1), (2, 48, 32, 1), (2, 48, 32, 5000), (1, 112, 16, 5000), (1, 128, 128, 5000), (1, 64, 64, 1 << 20)],
)
def test_the_encoder_in_tiles_is_the_whole_encoder(
    pipeline: Pipeline, decoder: TiledDecoder, batch: int, height: int, width: int, values: int
) -> None:
    image = np.random.default_rng(5).uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)
    kept = image.copy()
    found = TiledEncoder(decoder.config, decoder.weights, NumpyTileKernels(values))(image)
    for one, other in zip(found, session(pipeline).encode(image), strict=True):
        assert one.shape == other.shape
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_array_equal(image, kept)


def test_memory_of_the_encoder_is_what_the_plan_says(decoder: TiledDecoder) -> None:
    encoder = TiledEncoder(decoder.config, decoder.weights, NumpyTileKernels(TILE_VALUES))
    image = np.random.default_rng(3).uniform(-1, 1, (1, 3, 320, 320)).astype(np.float32)
    tracemalloc.start()
    try:
        encoder(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    fixed = tiled_encoder_bytes(decoder.config, 0, 0)
    maps = tiled_encoder_bytes(decoder.config, 320, 320) - fixed
    assert 0.5 * maps < peak < maps + 40 * TILE_VALUES * 4


def test_memory_is_what_the_plan_says(pipeline: Pipeline, decoder: TiledDecoder) -> None:
    latents = np.random.default_rng(3).standard_normal((1, 16, 40, 40), dtype=np.float32)
    tracemalloc.start()
    try:
        decoder(latents)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    fixed = tiled_bytes(decoder.config, 0, 0)
    maps = tiled_bytes(decoder.config, 320, 320) - fixed
    assert 0.5 * maps < peak < maps + 40 * TILE_VALUES * 4


def plan(pipeline: Pipeline, geometry: ImageGeometry, available: int) -> MemoryPlan:
    return plan_memory(pipeline.bundle.manifest, Work(geometry=geometry, tokens=20), available=available)


def test_the_plan_tiles_before_it_refuses(pipeline: Pipeline) -> None:
    manifest = pipeline.bundle.manifest
    geometry = image_geometry(4096, 4096, manifest.config)
    roomy = plan(pipeline, geometry, 1 << 50)
    assert not roomy.tiled
    decode = roomy.programs[Program.DECODER]
    base = roomy.peak - max(roomy.programs.values())
    assert not plan(pipeline, geometry, max(roomy.peak, base + decode)).tiled
    tight = plan(pipeline, geometry, base + decode - 1)
    assert tight.tiled
    assert tight.programs[Program.DECODER] == tiled_bytes(manifest.config.vae, 4096, 4096) < decode
    assert plan(pipeline, geometry, tight.peak).tiled
    with raises_with(MemoryLimitError, "4096x4096", "GiB", "largest size"):
        plan(pipeline, geometry, tight.peak - 1)


def watch(kind: type, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that a tiled decoder or encoder is called with."""
    used: list[tuple[int, ...]] = []
    call = kind.__call__

    def watched(self: Any, values: FloatArray) -> object:
        used.append(values.shape)
        return call(self, values)

    monkeypatch.setattr(kind, "__call__", watched)
    return used


def test_an_image_generated_in_tiles_is_the_same(
    bundle: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = pipeline.prepare(Request("a fox", size=(512, 512), steps=1, seed=4)).geometry
    roomy = plan(pipeline, geometry, 1 << 50)
    expected = pipeline.generate("a fox", size=(512, 512), steps=1, seed=4).images[0]
    used = watch(TiledDecoder, monkeypatch)
    monkeypatch.setattr(memory, "available_memory", lambda: roomy.peak - 1)
    image = Pipeline.from_bundle(bundle).generate("a fox", size=(512, 512), steps=1, seed=4).images[0]
    assert used == [(1, 16, 64, 64)]
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16))
    assert difference.max() <= 1


def test_a_source_image_is_encoded_in_tiles_before_it_is_refused(
    bundle: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(6).integers(0, 256, (512, 512, 3)).astype(np.uint8))
    manifest = pipeline.bundle.manifest
    work = Work(geometry=image_geometry(512, 512, manifest.config), tokens=20)
    assert Program.ENCODER not in plan_memory(manifest, work, available=1 << 50).programs
    roomy = plan_memory(manifest, replace(work, encodes=True), available=1 << 50)
    assert not roomy.encodes_tiled
    base = roomy.peak - max(roomy.programs.values())
    tight = base + roomy.programs[Program.ENCODER] - 1
    planned = plan_memory(manifest, replace(work, encodes=True), available=tight)
    assert planned.encodes_tiled
    assert planned.programs[Program.ENCODER] == tiled_encoder_bytes(manifest.config.vae, 512, 512)
    expected = pipeline.generate("a fox", steps=1, seed=4, image=image, strength=0.5).images[0]
    used = watch(TiledEncoder, monkeypatch)
    held = 3 * 512 * 512  # of the finished image
    monkeypatch.setattr(memory, "available_memory", lambda: tight + held)
    found = Pipeline.from_bundle(bundle).generate("a fox", steps=1, seed=4, image=image, strength=0.5).images[0]
    assert used == [(1, 3, 512, 512)]
    assert np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= 1
    monkeypatch.setattr(memory, "available_memory", lambda: base)
    generated = Pipeline.from_bundle(bundle)
    with raises_with(MemoryLimitError, "512x512"):
        generated.prepare(Request("a fox", steps=1, seed=4, image=image))
