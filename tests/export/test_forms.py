"""Quantized tensors are read as the program that wrote them reads them: whole, by rows, and in fused parts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from form_writers import GGUF_WRITTEN, WRITERS, Written, comfy_tensors, write_comfy, write_gguf
from safetensors.torch import save_file
from single_file_tools import write_headers

from zimage_export.source.contents import read_contents
from zimage_export.source.tensors import TensorSource
from zimage_runtime.bundle.tensors import DType, to_float32

pytestmark = pytest.mark.deep

ROWS, WIDTH = 3 * 160, 192  # no multiple of the 128 rows of a tile of scales; three parts


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Rows of different magnitude, so that a scale of another row is seen."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.linspace(0.2, 3, ROWS)[:, None]
    return torch.randn(ROWS, WIDTH, generator=generator) * rows


def assert_reads_as(tensor: TensorSource, values: np.ndarray, tolerance: float = 0) -> None:
    """Whole, in pieces, in the middle, row by row, and as three equal parts."""

    def same(found: np.ndarray, expected: np.ndarray) -> None:
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)

    assert tensor.shape == values.shape
    assert tensor.quantized
    same(tensor.read(), values)
    pieces = [to_float32(piece, tensor.dtype) for piece in tensor.chunks(7 * WIDTH * tensor.dtype.size)]
    assert max(piece.size for piece in pieces) == 7 * WIDTH
    same(np.concatenate(pieces).reshape(values.shape), values)
    same(tensor.rows(125, 10), values[125:135])
    same(tensor.picked_rows([0, 300, 131]), values[[0, 300, 131]])
    for index, part in enumerate(np.split(values, 3)):
        found = tensor.part(index, 3).renamed("part")
        same(found.read(), part)
        same(found.read_rows(5), part[:5])


@pytest.mark.parametrize("form", WRITERS)
def test_a_form_is_read_as_its_program_reads_it(form: str, weight: torch.Tensor, tmp_path: Path) -> None:
    written = WRITERS[form](weight)
    path = write_comfy(
        tmp_path / "a.safetensors",
        {"net.layer.weight": written},
        {"net.layer.bias": torch.ones(3)},
        old_prefix="net." if form.startswith("old") else None,
    )
    contents = read_contents(path)
    assert set(contents.tensors) == {"net.layer.weight", "net.layer.bias"}
    # a rotation is a sum of products, whose order is free
    assert_reads_as(contents.tensors["net.layer.weight"], written.values.numpy(), 2e-6 if "convrot" in form else 0)
    assert not contents.tensors["net.layer.bias"].quantized


def test_what_has_a_scale_takes_float32_and_what_has_none_fits_fp16(weight: torch.Tensor, tmp_path: Path) -> None:
    found = {}
    for form in ("fp8 e4m3", "fp8 e5m2", "comfy fp8 e4m3", "nvfp4"):
        path = write_comfy(tmp_path / f"{form}.safetensors", {"a.weight": WRITERS[form](weight)}, {})
        found[form] = read_contents(path).tensors["a.weight"].dtype
    assert found == {"fp8 e4m3": DType.F16, "fp8 e5m2": DType.F16, "comfy fp8 e4m3": DType.F32, "nvfp4": DType.F32}


@pytest.mark.parametrize("form", ["int8_tensorwise", "nvfp4"])
def test_memory_is_bounded(form: str, tmp_path: Path) -> None:
    """16 million values, 64 MB in float32, read in pieces of 1 MB."""
    import tracemalloc

    side, quant = 4096, json.dumps({"layers": {"a": form}})
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "a.weight_scale": ("F32", (side, 1)),
        "a.weight": ("I8", (side, side)),
    }
    if form == "nvfp4":
        tensors = {
            "a.weight": ("U8", (side, side // 2)),
            "a.weight_scale": ("F8_E4M3", (side, side // 16)),
            "a.weight_scale_2": ("F32", ()),
        }
    path = write_headers(tmp_path / "a.safetensors", tensors, {"_quantization_metadata": quant})
    tensor = read_contents(path).tensors["a.weight"]
    tracemalloc.start()
    try:
        assert sum(piece.size for piece in tensor.chunks(1 << 20)) == side * side
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_layers_listed_in_the_metadata(prefix: str, weight: torch.Tensor, tmp_path: Path) -> None:
    """Some makers leave the tensors' prefix out of the list."""
    written = WRITERS["int8 convrot"](weight)
    tensors = comfy_tensors({f"{prefix}layers.0.w.weight": Written(written.weight, written.values, written.companions)})
    listed = {"format_version": "1.0", "layers": {"layers.0.w": written.marker}}
    save_file(tensors, tmp_path / "a.safetensors", {"_quantization_metadata": json.dumps(listed)})
    found = read_contents(tmp_path / "a.safetensors").tensors[f"{prefix}layers.0.w.weight"]
    assert_reads_as(found, written.values.numpy(), 2e-6)


def test_the_metadata_wins_over_a_marker(weight: torch.Tensor, tmp_path: Path) -> None:
    written = WRITERS["int8 per row"](weight)
    assert written.marker is not None
    wrong = Written(written.weight, written.values, written.companions, {**written.marker, "convrot": True})
    listed = {"layers": {"a": "int8_tensorwise"}}
    save_file(
        comfy_tensors({"a.weight": wrong}), tmp_path / "a.safetensors", {"_quantization_metadata": json.dumps(listed)}
    )
    assert_reads_as(read_contents(tmp_path / "a.safetensors").tensors["a.weight"], written.values.numpy())


def test_a_scale_may_be_in_another_shard(weight: torch.Tensor, tmp_path: Path) -> None:
    tensors = comfy_tensors({"a.weight": (written := WRITERS["comfy fp8 e4m3"](weight))})
    shards = [tmp_path / f"m-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({"a.weight": tensors.pop("a.weight")}, shards[0])
    save_file(tensors, shards[1])
    for shard in shards:
        assert_reads_as(read_contents(shard).tensors["a.weight"], written.values.numpy())


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GGUF_WRITTEN)
def test_gguf_types_that_the_package_writes(kind: str, weight: torch.Tensor, tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "a.gguf", {"a.weight": (weight.numpy(), kind), "b": (np.ones(3, np.float32), "F32")})
    tensor = read_contents(tmp_path / "a.gguf").tensors["a.weight"]
    if kind in ("BF16", "F16"):
        np.testing.assert_array_equal(tensor.read(), values["a.weight"])
    else:
        assert_reads_as(tensor, values["a.weight"])


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_XS", "IQ1_M", "TQ2_0"]
)
def test_gguf_types_that_the_package_only_reads(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes, whose fp16 scales are kept small and finite, against the package's own reading."""
    import gguf

    member = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[member]
    data = np.random.default_rng(1).integers(0, 255, (12, 768 // block * size), np.uint8) & np.uint8(0x3B)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "lumina2")
    writer.add_tensor("a.weight", data, raw_dtype=member)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    expected = gguf.quants.dequantize(data, member)
    assert expected.std() > 0
    tensor = read_contents(tmp_path / "a.gguf").tensors["a.weight"]
    np.testing.assert_array_equal(tensor.read(), expected)
    np.testing.assert_array_equal(tensor.rows(5, 3), expected[5:8])
    np.testing.assert_array_equal(tensor.part(1, 3).picked_rows([3, 0]), expected[[7, 4]])


def test_gguf_shapes_that_were_flattened_for_blocks(tmp_path: Path) -> None:
    """ComfyUI-GGUF flattens a convolution's weight whose rows are no whole blocks, and keeps its shape in a key."""
    import gguf

    values = np.random.default_rng(2).normal(size=(8, 4, 3, 3)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_array("comfy.gguf.orig_shape.conv.weight", [8, 4, 3, 3])
    member = gguf.GGMLQuantizationType.Q8_0
    data = gguf.quants.quantize(values.reshape(9, 32), member)
    writer.add_tensor("conv.weight", data, raw_dtype=member)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    tensor = read_contents(tmp_path / "a.gguf").tensors["conv.weight"]
    expected = gguf.quants.dequantize(data, member).reshape(values.shape)
    np.testing.assert_array_equal(tensor.read(), expected)
    np.testing.assert_array_equal(tensor.rows(3, 2), expected[3:5])
