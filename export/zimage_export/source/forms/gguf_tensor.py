"""A quantized tensor of a GGUF file. The `gguf` package knows its types; we read the blocks that hold a few rows."""

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.bundle.tensors import DType, TensorEntry

from ..tensors import FileTensor, check_finite, read_elements

_BYTE = np.dtype(np.uint8)


def block_of(kind: str) -> tuple[int, int] | None:
    """The values and the bytes of a type's block; None for one that the `gguf` package does not dequantize."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    if kind not in GGMLQuantizationType.__members__:
        return None
    member = GGMLQuantizationType[kind]
    try:
        values, size = GGML_QUANT_SIZES[member]
        with np.errstate(all="ignore"):
            quants.dequantize(np.zeros((1, size), np.uint8), member)
    except (KeyError, NotImplementedError):
        return None
    return values, size


@dataclass(frozen=True)
class GgufTensor(FileTensor):
    """A tensor in blocks of quantized values, row by row."""

    kind: str  # ggml's name of the type
    block: tuple[int, int]  # values and bytes of a block
    entry: TensorEntry  # of the blocks of the whole tensor
    tensor_shape: tuple[int, ...]
    first_row: int = 0

    @property
    def dtype(self) -> DType:
        """Products with scales take float32."""
        return DType.F32

    @property
    def stored_as(self) -> str:
        """ggml's name of the type."""
        return self.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tensor_shape

    def _elements(self, first: int, count: int) -> NDArray[np.generic]:
        from gguf import GGMLQuantizationType, quants

        values, size = self.block
        start, stop = (self.first_row + first) * self._width, (self.first_row + first + count) * self._width
        block, last = start // values, math.ceil(stop / values)
        data = read_elements(self.path, self.entry, _BYTE, block * size, (last - block) * size)
        with np.errstate(all="ignore"), warnings.catch_warnings():  # what is not finite is reported below
            warnings.simplefilter("ignore", RuntimeWarning)
            # whole rows, of which the package takes 16 at a time, or all blocks as one
            rows = data.reshape(1 if self._width % values else count, -1)
            found = quants.dequantize(rows, GGMLQuantizationType[self.kind]).reshape(-1)
        return check_finite(found[start - block * values : stop - block * values], self.name, self.path)

    def part(self, index: int, parts: int) -> Self:
        """One of several equal ranges of its rows."""
        count = self.shape[0] // parts
        shape = (count, *self.shape[1:])
        return dataclasses.replace(self, tensor_shape=shape, first_row=self.first_row + index * count)

    def reshaped(self, shape: tuple[int, ...]) -> Self:
        """The same elements in another shape, with the same rows."""
        return dataclasses.replace(self, tensor_shape=shape)
