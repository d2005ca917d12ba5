"""Element types: float32 in, stored elements out."""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from zimage_runtime.tensors import DType

from .errors import ExportError


def encode(values: NDArray[np.float32], dtype: DType, name: str) -> NDArray[np.generic]:
    """Rounds float32 to nearest even in a floating-point type. Raises `ExportError` for what leaves fp16's range."""
    if dtype is DType.BF16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    if dtype is not DType.F16:
        return values.astype(dtype.storage, copy=False)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError(f"{name}: holds values that fp16 cannot; use --precision bf16")
    return half
