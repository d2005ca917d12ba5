"""Element types: float32 in, stored elements out."""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from zimage_runtime.bundle.tensors import DType

from ..errors import ExportError

_INFINITE = 0x7C00  # fp16's bits from infinity on, the sign left out


def encode(values: NDArray[np.float32], dtype: DType, name: str) -> NDArray[np.generic]:
    """Rounds float32 to nearest even in a floating-point type. Raises `ExportError` for values beyond fp16's range."""
    if dtype is DType.BF16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    if dtype is not DType.F16:
        return values.astype(dtype.storage, copy=False)
    half = _to_half(values)
    if half.size and int((half.view(np.uint16) & 0x7FFF).max()) >= _INFINITE:
        raise ExportError(f"{name}: contains values beyond fp16's range; use --precision bf16")
    return half


def _to_half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """float32 → fp16. torch's conversion is several times faster than numpy's, and rounds alike."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one would spin between pieces, on the core that hashes and writes
    try:
        half: NDArray[np.float16] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float16).numpy()
    finally:
        torch.set_num_threads(threads)
    return half
