"""A tensor on its way into a bundle: how it is stored, and what it is multiplied by before."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.rebalancing import Factors
from zimage_runtime.bundle.tensors import DType, to_float32

from ..source.tensors import TensorSource

_ROWS_BYTES = 4 << 20  # of float32: what a processor's cache holds


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the bundle stores it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[NDArray[np.generic]]]  # its elements in order, in pieces of bounded size

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.size


def total_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes of several tensors' data."""
    return sum(tensor.nbytes for tensor in tensors)


NO_FACTORS = Factors()

LazyFactors = Callable[[], Factors]
"""Factors that are computed from the checkpoint when they are first needed."""


def row_chunks(source: TensorSource, factors: Factors = NO_FACTORS) -> Iterator[tuple[int, FloatArray]]:
    """A weight's rows in float32, times its factors, in pieces of a few: the first row's number, and the rows."""
    width = source.shape[1]
    rows = max(_ROWS_BYTES // (4 * width), 1)
    first = 0
    for piece in source.chunks(rows * width * source.dtype.size):
        values = to_float32(piece, source.dtype).reshape(-1, width)
        yield first, factors.apply(values, first)
        first += len(values)
