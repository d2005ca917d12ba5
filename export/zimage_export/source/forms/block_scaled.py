"""NVFP4 and MXFP8: a scale for each few inputs of a row, in the order in which NVIDIA's tensor cores read scales.

The scales lie in tiles of 128 rows and 4 blocks, each of which is stored as 32 x 16 bytes: byte
16 · (row mod 32) + 4 · (row div 32) + block. Rows and blocks are padded to whole tiles.

Sources: ``comfy_kitchen/float_utils.py``, ``from_blocked``; ``backends/eager/quantization.py``; NVIDIA's cuBLAS
documentation, "1D block scaling factors layout".
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.tensors import DType, TensorEntry

from ..tensors import FileTensor, check_finite, read_elements
from .scaled import E4M3, code_values

NVFP4, MXFP8 = "nvfp4", "mxfp8"
BLOCKS = {NVFP4: 16, MXFP8: 32}
"""Inputs that share a scale."""

_BYTE = np.dtype(np.uint8)
_TILE_ROWS, _TILE_BLOCKS = 128, 4


def scale_bytes(rows: int, width: int, form: str) -> int:
    """The size of a tensor's scales, padded to whole tiles."""
    blocks = width // BLOCKS[form]
    return math.ceil(rows / _TILE_ROWS) * _TILE_ROWS * math.ceil(blocks / _TILE_BLOCKS) * _TILE_BLOCKS


@functools.cache
def _pairs() -> FloatArray:
    """[256, 2]: the two E2M1 values of each byte, the one of the even input in the upper four bits."""
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    codes = np.arange(256)
    return np.stack([values[codes >> 4], values[codes & 15]], axis=-1)


@functools.cache
def _exponents() -> FloatArray:
    """[256]: E8M0, powers of two; 255 is not a number."""
    return np.asarray(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


@dataclass(frozen=True)
class BlockScaledTensor(FileTensor):
    """A tensor [out, in] in NVFP4 or MXFP8."""

    form: str
    entry: TensorEntry  # of the values, with the file's shape
    scales: TensorEntry  # of the tiles of scales
    scales_path: Path
    scale: FileTensor | None  # NVFP4: one scale for all
    inputs: FileTensor | None  # [in]: what the layer's inputs are multiplied by, so the columns are
    first_row: int
    row_count: int

    @property
    def dtype(self) -> DType:
        """Products with scales take float32."""
        return DType.F32

    @property
    def stored_as(self) -> str:
        """The form's name."""
        return self.form

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.row_count, self.entry.shape[1] * (2 if self.form == NVFP4 else 1)

    def _elements(self, first: int, count: int) -> NDArray[np.generic]:
        first += self.first_row
        width = self.entry.shape[1]
        data = read_elements(self.path, self.entry, _BYTE, first * width, count * width)
        values = (_pairs() if self.form == NVFP4 else code_values(E4M3))[data]
        values = values.reshape(count, -1, BLOCKS[self.form]) * self._scales(first, count)[..., None]
        if self.inputs is not None:
            values = values.reshape(count, -1) * self.inputs.read().reshape(1, -1)
        return check_finite(values, self.name, self.path).reshape(-1)

    def _scales(self, first: int, count: int) -> FloatArray:
        """[count, blocks]"""
        blocks = self.shape[1] // BLOCKS[self.form]
        across = math.ceil(blocks / _TILE_BLOCKS)
        tile_row, last = first // _TILE_ROWS, math.ceil((first + count) / _TILE_ROWS)
        size = _TILE_ROWS * across * _TILE_BLOCKS  # of a row of tiles
        data = read_elements(self.scales_path, self.scales, _BYTE, tile_row * size, (last - tile_row) * size)
        tiles = data.reshape(-1, across, 32, 4, _TILE_BLOCKS)
        by_row = tiles.transpose(0, 3, 2, 1, 4).reshape(-1, across * _TILE_BLOCKS)
        start = first - tile_row * _TILE_ROWS
        codes = by_row[start : start + count, :blocks]
        if self.form == MXFP8:
            return np.asarray(_exponents()[codes])
        assert self.scale is not None
        return np.asarray(self.scale.read().reshape(()) * code_values(E4M3)[codes])

    def part(self, index: int, parts: int) -> Self:
        """One of several equal ranges of its rows."""
        count = self.row_count // parts
        return dataclasses.replace(self, first_row=self.first_row + index * count, row_count=count)

    def reshaped(self, shape: tuple[int, ...]) -> Self:
        """These forms are of matrices alone."""
        raise AssertionError("a block-scaled tensor has two axes")
