"""The weight of a linear layer as a bundle stores it, and as it was published.

`zimage_export.storage` states the forms. A weight that was rotated, multiplied by rebalancing factors, or by a power of
two, is brought back; what rounding took is lost.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..arrays import FloatArray
from ..model.hadamard import rotated
from ..model.linears import LAYER_LINEARS
from .bundle import Bundle
from .rebalancing import RebalancingFactors
from .tensors import DType, TensorFile, to_float32

SCALE_SUFFIX = "_scale"
"""The suffix of the names of a weight's scales."""

BLOCK_SIZE = 32
"""Inputs that share a scale in a weight of blocks."""


def dequantized(integers: NDArray[np.generic], scales: FloatArray) -> FloatArray:
    """The weight [out, in] that stored integers stand for.

    int8 is [in, out], with a scale per output channel. Blocks are uint8, with a scale for each: [out, blocks, 32]
    around 128, or [out, blocks, 16] with two values around 8 in each, the first in the low four bits.
    """
    if integers.dtype == np.int8:
        return integers.T.astype(np.float32) * scales[:, None]
    if integers.shape[-1] == BLOCK_SIZE:
        values = integers.astype(np.float32) - np.float32(128)
    else:
        nibbles = integers.astype(np.uint8)
        both = np.stack([nibbles & 15, nibbles >> 4], axis=-1)
        values = both.reshape(*integers.shape[:2], BLOCK_SIZE).astype(np.float32) - np.float32(8)
    return (values * scales[..., None]).reshape(len(integers), -1)


def fold_of(bundle: Bundle, component: str, linear: str) -> float:
    """The power of two that a layer's stored weight was multiplied by (`zimage_export.storage.folds`)."""
    block, _, tail = linear.partition(".")
    index, _, tail = tail.partition(".")
    folds = bundle.manifest.folds.get(component, {}).get(f"{block}.{index}", {})
    names = LAYER_LINEARS[component]
    kind = {names.out: "attention", names.up: "ffn"}.get(tail)
    return float(2.0 ** -folds.get(kind, 0)) if kind else 1.0


@dataclass
class PublishedRows:
    """The published weights of a bundle's component, a few rows at a time."""

    bundle: Bundle
    component: str
    _file: TensorFile = field(init=False, repr=False)
    _factors: RebalancingFactors = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises `BundleError` for a rebalanced bundle without its factors."""
        self._file = TensorFile(self.bundle.file(self.bundle.manifest.weights[self.component]))
        self._factors = RebalancingFactors(self.bundle, self.component)

    def rows(self, linear: str, start: int, stop: int) -> FloatArray:
        """Rows of a linear layer's weight [out, in], by the layer's name in the component, in float32."""
        weight = f"{linear}.weight"
        values, dtype = self._file.array(weight)
        if dtype in (DType.I8, DType.U8):
            scales = to_float32(*self._file.array(weight + SCALE_SUFFIX))[start:stop]
            rows = dequantized(values[:, start:stop] if dtype is DType.I8 else values[start:stop], scales)
        else:
            rows = to_float32(values[start:stop], dtype)
        if size := self.bundle.manifest.rotations.get(f"{self.component}/{weight}"):
            rows = rotated(rows, size)
        factors = self._factors.of(weight)
        if factors.columns is not None:
            rows = rows / factors.columns
        if factors.rows is not None:
            rows = rows / factors.rows[start:stop, None]
        return rows / np.float32(fold_of(self.bundle, self.component, linear))
