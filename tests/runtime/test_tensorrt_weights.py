"""Weights are converted to what a program takes exactly as others convert them."""

import ml_dtypes
import numpy as np
import pytest
from facts import raises_with
from numpy.typing import NDArray

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.errors import BundleError
from zimage_runtime.executors.tensorrt.weight_source import convert

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
