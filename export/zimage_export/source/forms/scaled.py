"""One byte per value, times a scale: fp8 with and without scales, int8, and int8 after a rotation (ConvRot).

ConvRot multiplies each group of a row's inputs by the regular Hadamard matrix H of the group's size, Kronecker products
of one 4 x 4 matrix, before it is rounded. H is symmetric and orthogonal, so multiplying by H again restores the row.

Sources: ``comfy_kitchen/tensor/int8_utils.py``, ``comfy_kitchen/backends/eager/quantization.py``; ComfyUI's
``comfy/ops.py``, ``_load_quantized_module``.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.tensors import DType, TensorEntry
from zimage_runtime.model.hadamard import hadamard

from ..tensors import FileTensor, check_finite, not_finite, read_elements

E4M3, E5M2, INT8 = "F8_E4M3", "F8_E5M2", "I8"
CODES = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2, INT8: np.int8}
"""The types of one byte, by their safetensors names."""

_NO_NUMBER = {E4M3: np.uint8(0x7F), E5M2: np.uint8(0x7C)}
"""Bits that are all set in what is infinite or not a number."""

_BYTE = np.dtype(np.uint8)


@functools.cache
def code_values(codes: str) -> FloatArray:
    """[256]: what each byte stands for."""
    return np.asarray(np.arange(256, dtype=np.uint8).view(CODES[codes]).astype(np.float32))


@functools.cache
def _half_values(codes: str) -> NDArray[np.float16]:
    """[256]: the same in fp16, which holds them all."""
    return code_values(codes).astype(np.float16)


def is_rotation_size(size: int) -> bool:
    """Whether there is a regular Hadamard matrix of this size: the powers of four."""
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1


@dataclass(frozen=True)
class ScaledTensor(FileTensor):
    """A tensor of one byte per value."""

    entry: TensorEntry  # of the bytes, whatever type the file calls them
    codes: str  # what the bytes are, a key of `CODES`
    scale: FileTensor | None = (
        None  # [], [1], [out], [out, 1], or per block of inputs [out, blocks] or [out, blocks, 1]
    )
    rotation: int = 0  # inputs that were rotated together; 0 for none
    part_of: tuple[int, int] = (0, 1)  # which of how many equal ranges of rows, for scales per row

    @property
    def dtype(self) -> DType:
        """fp16 holds every fp8 value; a product with a scale takes float32."""
        return DType.F16 if self.scale is None else DType.F32

    @property
    def stored_as(self) -> str:
        """The type of the bytes."""
        return self.codes

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.entry.shape

    def _elements(self, first: int, count: int) -> NDArray[np.generic]:
        width = self._width
        data = read_elements(self.path, self.entry, _BYTE, first * width, count * width)
        no_number = _NO_NUMBER.get(self.codes)
        if no_number is not None and (np.bitwise_and(data, no_number) == no_number).any():
            raise not_finite(self.name, self.path)
        if self.scale is None:
            return np.asarray(_half_values(self.codes)[data])
        values = code_values(self.codes)[data].reshape(count, width)
        scales = self._scales(first, count)
        if scales.shape[-1] > 1:
            values = values.reshape(count, scales.shape[-1], -1) * scales[..., None]
        else:
            values *= scales
        if self.rotation:
            values = values.reshape(-1, self.rotation) @ hadamard(self.rotation)
        return np.asarray(values.reshape(-1))

    @property
    def has_row_scales(self) -> bool:
        """Whether a row has one scale: its own, or that of all rows."""
        return self.scale is not None and int(np.prod(self.scale.shape)) in (1, self._row_count * self.part_of[1])

    def integers(self, first: int, count: int) -> NDArray[np.int8]:
        """`count` rows from `first` as the file's integers."""
        data = read_elements(self.path, self.entry, _BYTE, first * self._width, count * self._width)
        return data.view(np.int8).reshape(count, -1)

    def row_scales(self) -> FloatArray:
        """[rows]: the scale of each row."""
        scales = self._scales(0, self._row_count).reshape(-1)
        return np.broadcast_to(scales, (self._row_count,)).copy()

    def _scales(self, first: int, count: int) -> FloatArray:
        """[1, 1], or [count, blocks]."""
        assert self.scale is not None
        index, parts = self.part_of
        total = self._row_count * parts
        if np.prod(self.scale.shape) == 1:
            scales = self.scale.read().reshape(1, 1)
        else:
            by_row = self.scale.reshaped((total, int(np.prod(self.scale.shape)) // total))
            scales = by_row.rows(index * self._row_count + first, count)
        return check_finite(scales, self.scale.name, self.path)

    def part(self, index: int, parts: int) -> Self:
        """One of several equal ranges of its rows."""
        shape = (self.shape[0] // parts, *self.shape[1:])
        nbytes = self.entry.nbytes // parts
        entry = dataclasses.replace(self.entry, shape=shape, nbytes=nbytes, offset=self.entry.offset + index * nbytes)
        return dataclasses.replace(self, entry=entry, part_of=(index, parts))

    def reshaped(self, shape: tuple[int, ...]) -> Self:
        """The same elements in another shape, with the same rows."""
        return dataclasses.replace(self, entry=dataclasses.replace(self.entry, shape=shape))
