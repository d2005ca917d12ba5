"""GGUF files: a header of keys and values, a list of tensors, and their data.

The header is read here, with every size checked, because the files that people have are also truncated, renamed and
from other programs. Source: ggml's ``docs/gguf.md``.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zimage_runtime.bundle.tensors import TensorEntry

from ..errors import CheckpointError, require_gguf
from .forms.gguf_tensor import GgufTensor, block_of
from .tensors import FLOATING, FileTensor, PlainTensor

MAGIC = b"GGUF"

_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = "general.alignment"
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_MOST = 1 << 20  # tensors, or keys: far more than any model has
_MOST_AXES = 8

Value = str | int | float | bool | tuple[int, ...] | None
"""A key's value: arrays of a few integers as a tuple, other arrays as None."""


@dataclass(frozen=True)
class GgufContents:
    """What a GGUF file contains."""

    tensors: dict[str, FileTensor]
    values: dict[str, Value]


def read_gguf(path: Path) -> GgufContents:
    """The tensors and the keys of a file.

    Raises `CheckpointError` for one that is truncated, damaged or unknown, and `ExportError` without the gguf package.
    """
    require_gguf()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(path, file, size).contents()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size

    def contents(self) -> GgufContents:
        magic = self._bytes(4)
        version = int(self._scalar("I"))
        if magic != MAGIC or version not in _VERSIONS:
            raise CheckpointError(f"{self._path}: not a GGUF file of version 2 or 3")
        tensor_count, key_count = int(self._scalar("Q")), int(self._scalar("Q"))
        if max(tensor_count, key_count) > _MOST:
            raise self._damaged(f"it says that it has {tensor_count} tensors and {key_count} keys")
        values = {}
        for _ in range(key_count):
            key = self._string()
            values[key] = self._value(int(self._scalar("I")))
        listed = [self._listed() for _ in range(tensor_count)]
        alignment = values.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"its alignment is {alignment}")
        start = math.ceil(self._file.tell() / alignment) * alignment
        return GgufContents({one.name: self._tensor(one, start, values) for one in listed}, values)

    def _listed(self) -> "_Listed":
        name = self._string()
        axes = int(self._scalar("I"))
        if axes > _MOST_AXES:
            raise self._damaged(f"{name} has {axes} axes")
        shape = tuple(int(self._scalar("Q")) for _ in range(axes))[::-1]  # ggml counts axes from the innermost
        return _Listed(name, shape, int(self._scalar("I")), int(self._scalar("Q")))

    def _tensor(self, listed: "_Listed", start: int, values: Mapping[str, Value]) -> FileTensor:
        kind = _kind_name(listed.kind)
        shape = listed.shape
        count = math.prod(shape)
        original = values.get(_ORIGINAL_SHAPE + listed.name)
        if isinstance(original, tuple) and math.prod(original) == count:
            shape = original
        offset = start + listed.offset
        if kind in FLOATING:
            nbytes = count * {"F32": 4}.get(kind, 2)
            self._check_inside(listed.name, offset, nbytes)
            return PlainTensor(listed.name, self._path, TensorEntry(kind, shape, offset, nbytes))
        block = block_of(kind)
        if block is None:  # `Weights.get` refuses it, if it is needed
            return PlainTensor(listed.name, self._path, TensorEntry(kind, shape, offset, 0))
        if count % block[0]:
            raise self._damaged(f"{listed.name} of shape {list(shape)} is no whole number of {kind} blocks")
        nbytes = count // block[0] * block[1]
        self._check_inside(listed.name, offset, nbytes)
        return GgufTensor(listed.name, self._path, kind, block, TensorEntry(kind, shape, offset, nbytes), shape)

    def _check_inside(self, name: str, offset: int, nbytes: int) -> None:
        if offset + nbytes > self._size:
            missing = offset + nbytes - self._size
            raise CheckpointError(
                f"{self._path}: truncated: {missing} bytes of {name} are missing; download or copy it again"
            )

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS.get(kind, ""))
        element, length = int(self._scalar("I")), int(self._scalar("Q"))
        if element == _STRING:
            for _ in range(length):
                self._skip(int(self._scalar("Q")))
            return None
        code = _SCALARS.get(element, "")
        if code and code not in "fd?" and length <= _MOST_AXES:
            return tuple(int(self._scalar(code)) for _ in range(length))
        self._skip(struct.calcsize(f"<{self._known(code)}") * length)
        return None

    def _known(self, code: str) -> str:
        if not code:
            raise self._damaged("a key has a value of an unknown type")
        return code

    def _scalar(self, code: str) -> int | float | bool:
        form = struct.Struct(f"<{self._known(code)}")
        (value,) = form.unpack(self._bytes(form.size))
        return value  # type: ignore[no-any-return]

    def _string(self) -> str:
        data = self._bytes(int(self._scalar("Q")))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._damaged("a name is not text") from None

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise CheckpointError(f"{self._path}: truncated inside its header; download or copy it again")
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise CheckpointError(f"{self._path}: truncated inside its header; download or copy it again")
        self._file.seek(count, 1)

    def _damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: not a sound GGUF file: {problem}; download or copy it again")


@dataclass(frozen=True)
class _Listed:
    """A line of the list of tensors."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # from the start of the data


def _kind_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(kind).name)
    except ValueError:
        return f"type {kind}"
