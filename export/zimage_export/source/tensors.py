"""One tensor of a checkpoint, in whatever form a file stores it: it is read as floating-point rows, piece by piece.

`PlainTensor` is stored as floating point already. The quantized forms are in `forms`; all of them are read through
`TensorSource`, so that nothing past this room knows how a file stores its weights.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.tensors import DType, TensorEntry, to_float32

from ..errors import CheckpointError

FLOATING = (DType.F32, DType.F16, DType.BF16)
"""The element types that a checkpoint's plain weights may have."""

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorSource(ABC):
    """One tensor of a checkpoint, on disk. Of one with fewer than two axes, all elements are one row."""

    name: str
    path: Path

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @property
    @abstractmethod
    def dtype(self) -> DType:
        """The floating-point type of what `chunks` yields. Its values are those of the file, exactly."""

    @property
    @abstractmethod
    def stored_as(self) -> str:
        """How the file stores it, for messages."""

    @abstractmethod
    def _elements(self, first: int, count: int) -> NDArray[np.generic]:
        """`count` rows from `first`, flat, in `dtype`. Raises `CheckpointError`."""

    @property
    def readable(self) -> bool:
        """Whether it is stored in a form that we read."""
        return True

    def renamed(self, name: str) -> Self:
        """The same tensor under another name."""
        return dataclasses.replace(self, name=name)

    @property
    def quantized(self) -> bool:
        """Whether its values were rounded to fewer bits than 16."""
        return self.stored_as not in FLOATING

    @property
    def _row_count(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def _width(self) -> int:
        return math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape)

    def chunks(self, max_bytes: int = _CHUNK_BYTES) -> Iterator[NDArray[np.generic]]:
        """The elements in `dtype`, flat, in whole rows of at most `max_bytes`, or one; read, not mapped."""
        step = max(max_bytes // max(self._width * self.dtype.size, 1), 1)
        for first in range(0, self._row_count, step):
            yield self._elements(first, min(step, self._row_count - first))

    def rows(self, first: int, count: int) -> FloatArray:
        """`count` rows from `first` in float32, [count, …]."""
        values = to_float32(self._elements(first, count), self.dtype)
        return values.reshape(count, *(self.shape[1:] if len(self.shape) > 1 else self.shape))

    def read_rows(self, count: int) -> FloatArray:
        """The first `count` rows in float32; fewer where the tensor has fewer.

        Decisions are made from them, so they are checked: raises `CheckpointError` for a value that is not finite.
        """
        return check_finite(self.rows(0, min(count, self._row_count)), self.name, self.path)

    def picked_rows(self, chosen: Iterable[int]) -> FloatArray:
        """Single rows in float32, in the order of their numbers given, checked as those of `read_rows`."""
        return check_finite(np.concatenate([self.rows(int(row), 1) for row in chosen]), self.name, self.path)

    def read(self) -> FloatArray:
        """The whole tensor in float32."""
        flat = [to_float32(piece, self.dtype) for piece in self.chunks()]
        return np.concatenate(flat or [np.empty(0, np.float32)]).reshape(self.shape)


@dataclass(frozen=True)
class FileTensor(TensorSource):
    """A tensor as a file has it, which may be taken apart and given another shape: files have layouts of their own."""

    @abstractmethod
    def part(self, index: int, parts: int) -> Self:
        """One of several equal ranges of its rows. The caller checks that they are equal."""

    @abstractmethod
    def reshaped(self, shape: tuple[int, ...]) -> Self:
        """The same elements in another shape, with the same rows."""


@dataclass(frozen=True)
class PlainTensor(FileTensor):
    """A tensor whose elements are stored as they are; also one of a type that `Weights.get` refuses."""

    entry: TensorEntry

    @property
    def dtype(self) -> DType:
        """The stored element type."""
        return DType(self.entry.dtype)

    @property
    def stored_as(self) -> str:
        """The stored element type, which may be one that we do not read."""
        return self.entry.dtype

    @property
    def readable(self) -> bool:
        """Whether it has a floating-point type that we read."""
        return self.entry.dtype in FLOATING

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.entry.shape

    def chunks(self, max_bytes: int = _CHUNK_BYTES) -> Iterator[NDArray[np.generic]]:
        """The stored elements, flat, in pieces of at most `max_bytes`; read, not mapped, so memory stays bounded."""
        step = max(max_bytes // self.dtype.size, 1)
        total = self.entry.nbytes // self.dtype.size
        for first in range(0, total, step):
            yield self._range(first, min(step, total - first))

    def _elements(self, first: int, count: int) -> NDArray[np.generic]:
        return self._range(first * self._width, count * self._width)

    def _range(self, first: int, count: int) -> NDArray[np.generic]:
        return read_elements(self.path, self.entry, self.dtype.storage, first, count)

    def part(self, index: int, parts: int) -> Self:
        """One of several equal ranges of its rows."""
        shape = (self.shape[0] // parts, *self.shape[1:])
        nbytes = self.entry.nbytes // parts
        entry = dataclasses.replace(self.entry, shape=shape, nbytes=nbytes, offset=self.entry.offset + index * nbytes)
        return dataclasses.replace(self, entry=entry)

    def reshaped(self, shape: tuple[int, ...]) -> Self:
        """The same elements in another shape."""
        return dataclasses.replace(self, entry=dataclasses.replace(self.entry, shape=shape))


def read_elements(
    path: Path, entry: TensorEntry, storage: np.dtype[np.generic], first: int, count: int
) -> NDArray[np.generic]:
    """Elements of a tensor from its file. Raises `CheckpointError` for a file that became shorter or unreadable."""
    try:
        with path.open("rb") as file:
            file.seek(entry.offset + first * storage.itemsize)
            found: NDArray[np.generic] = np.fromfile(file, dtype=storage, count=count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(found) != count:
        raise CheckpointError(f"{path}: truncated while it was read; download or copy it again")
    return found


def check_finite(values: FloatArray, name: str, path: Path) -> FloatArray:
    """Raises `CheckpointError` for a tensor with a value that is not finite: its image would be white."""
    if not np.isfinite(values).all():
        raise not_finite(name, path)
    return values


def not_finite(name: str, path: Path) -> CheckpointError:
    """The error, for the caller to raise, for a tensor with a value that is not finite."""
    return CheckpointError(f"{path}: {name} contains values that are not finite; download or copy the file again")
