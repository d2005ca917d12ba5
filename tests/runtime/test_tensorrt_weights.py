"""Weights are converted to what a program takes exactly as others convert them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from facts import raises_with
from numpy.typing import NDArray

from zimage_export.engines.build import bundle_blocks, program_spec
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.tensors import DType, TensorFile
from zimage_runtime.errors import BundleError
from zimage_runtime.executors.tensorrt.block_catalog import BlockSpec
from zimage_runtime.executors.tensorrt.stage_sizes import block_layout
from zimage_runtime.executors.tensorrt.weight_source import WeightSource, convert, transpose
from zimage_runtime.machine.gpu_targets import Variant
from zimage_runtime.model.blocks import main_blocks

VALUES = np.concatenate(
    [
        np.random.default_rng(0).standard_normal(5000).astype(np.float32),
        np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 65280, 1e-8, 6e-8, -30000]),
    ]
)
TYPES = {DType.F32: np.float32, DType.F16: np.float16, DType.BF16: ml_dtypes.bfloat16}


def stored(values: NDArray[np.float32], dtype: DType) -> NDArray[np.generic]:
    return values.astype(TYPES[dtype]).view(dtype.storage)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wanted", TYPES)
def test_every_pair_of_floating_types(dtype: DType, wanted: DType) -> None:
    """Against numpy's and ml_dtypes' own rounding, halves between two values included."""
    source = stored(VALUES, dtype)
    target = np.zeros(len(VALUES), wanted.storage)
    convert(source, dtype, target, wanted, "w")
    widened = VALUES.astype(TYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(target, stored(widened, wanted))


def test_what_fp16_cannot_hold_and_what_is_no_float_is_refused() -> None:
    target = np.zeros(1, np.float16)
    with raises_with(BundleError, "w:", "fp16", "--precision fp16"):
        convert(np.float32([70000]), DType.F32, target, DType.F16, "w")
    with raises_with(BundleError, "w:", "F32", "I8", "zimage-export engines"):
        convert(np.float32([1]), DType.F32, np.zeros(1, np.int8), DType.I8, "w")
    whole = np.zeros(3, np.int8)
    convert(np.int8([1, -2, 3]), DType.I8, whole, DType.I8, "w")
    assert whole.tolist() == [1, -2, 3]


@pytest.fixture(scope="module")
def int8(bundle_in: Callable[[Precision], Path]) -> Bundle:
    return Bundle.open(bundle_in(Precision.INT8))


def test_joined_and_transposed_weights_lie_side_by_side(int8: Bundle) -> None:
    """Against the file's own tensors: [in, out] on the disk, [out, in] on the device, queries, keys, values in turn."""
    programs = {program.name: program for program in bundle_blocks(int8, Variant.AMPERE)}
    program = programs["transformer_block"]
    place = main_blocks(int8.manifest.config)[1]
    spec = program_spec(program, int8.manifest.config, "")
    layout = block_layout(spec, place)
    target = np.full(layout.nbytes, 0x5A, np.uint8)
    block = BlockSpec(program.name, program.scalars[place.key])
    WeightSource(int8).fill(target, place, spec, block, layout)
    stored = TensorFile(int8.file(int8.manifest.weights["transformer"]))
    for name, parts in (
        ("attention.qkv", [f"attention.to_{part}" for part in "qkv"]),
        ("feed_forward.gate_up", ["feed_forward.w1", "feed_forward.w3"]),
    ):
        at = layout.offsets[f"{name}.weight"]
        expected = [stored.array(place.tensor(f"{part}.weight"))[0].T for part in parts]
        joined = np.concatenate(expected)
        assert spec.weights[f"{name}.weight"].shape == joined.shape
        np.testing.assert_array_equal(target[at : at + joined.size].view(np.int8).reshape(joined.shape), joined)
        at = layout.offsets[f"{name}.weight_scale"]
        scales = np.concatenate([stored.array(place.tensor(f"{part}.weight_scale"))[0] for part in parts])
        np.testing.assert_array_equal(target[at : at + scales.nbytes].view(np.float32), scales)


def test_a_tensor_that_does_not_fit_its_part_is_named(int8: Bundle) -> None:
    program = next(p for p in bundle_blocks(int8, Variant.AMPERE) if p.name == "transformer_block")
    place = main_blocks(int8.manifest.config)[1]
    spec = program_spec(program, int8.manifest.config, "")
    name = "attention.qkv.weight"
    for parts in (("attention.to_q.weight",), ("attention.to_q.weight", "feed_forward.w2.weight")):
        wrong = replace(spec, weights={**spec.weights, name: replace(spec.weights[name], parts=parts)})
        layout = block_layout(wrong, place)
        block = BlockSpec(program.name, program.scalars[place.key])
        with raises_with(BundleError, place.tensor(parts[-1]), "shape", "zimage-export engines"):
            WeightSource(int8).fill(np.zeros(layout.nbytes, np.uint8), place, wrong, block, layout)


@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (96, 384)])
def test_transposing_moves_every_element(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).integers(-128, 128, shape, np.int8)
    target = np.zeros(shape[::-1], np.int8)
    transpose(values, DType.I8, target, DType.I8, "w")
    np.testing.assert_array_equal(target, values.T)
    with raises_with(BundleError, "w:", "F32", "I8", "zimage-export engines"):
        transpose(np.zeros(shape, np.float32), DType.F32, target, DType.I8, "w")
