"""Safetensors files: a header that says where each tensor lies, and the tensors' bytes.

ONNX programs refer to these files by offset, so both the exporter and the runtime need the header itself.
Format: 8 bytes of header length (little endian), a JSON header, then the data, in order and without gaps.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..checked_json import Fields
from ..errors import ZImageRuntimeError
from ..mistaken_files import HEAD_BYTES, mistaken_for

_MAX_HEADER = 100_000_000
_MAX_RANK = 64
_METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")


class TensorFileError(ZImageRuntimeError):
    """A safetensors file is missing, truncated or malformed."""


class DType(StrEnum):
    """The supported element types, by their safetensors names."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    I8 = "I8"
    U8 = "U8"

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return self.storage.itemsize

    @property
    def storage(self) -> np.dtype[np.generic]:
        """The numpy type of the stored elements; bfloat16, which numpy lacks, is stored as its 16 bits."""
        return np.dtype(_STORAGE[self])


_STORAGE = {DType.F32: "<f4", DType.F16: "<f2", DType.BF16: "<u2", DType.I8: "i1", DType.U8: "u1"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: str  # as the file names it, which `DType` may lack
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


def to_float32(values: NDArray[np.generic], dtype: DType) -> NDArray[np.float32]:
    """Stored floating-point elements as float32; exact for every floating-point type."""
    if dtype is DType.BF16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by name, checked to lie inside it. Raises `TensorFileError`."""
    header, data_start, size = _read_json_header(path)
    return {
        name: _read_entry(value, f"{path}: {name}", path, data_start, size)
        for name, value in header.items()
        if name != _METADATA
    }


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says about itself: texts by name. Raises `TensorFileError`."""
    metadata = _read_json_header(path)[0].get(_METADATA)
    if not isinstance(metadata, dict):
        return {}
    return {name: text for name, text in metadata.items() if isinstance(text, str)}


def data_offset(path: Path) -> int:
    """Where a file's tensors begin, after its header. Raises `TensorFileError`."""
    return _read_json_header(path)[1]


def _read_json_header(path: Path) -> tuple[dict[str, object], int, int]:
    """The header's object, where the data starts, and the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            if mistaken := mistaken_for(head):
                raise TensorFileError(f"{path}: {mistaken}")
            start = head[: _LENGTH.size]
            if len(start) < _LENGTH.size:
                raise TensorFileError(f"{path}: truncated: {size} bytes is too short for a safetensors file")
            (length,) = _LENGTH.unpack(start)
            if length > _MAX_HEADER:
                raise TensorFileError(f"{path}: not a safetensors file (its header would be {length} bytes)")
            if _LENGTH.size + length > size:
                raise TensorFileError(f"{path}: truncated inside its header; download or copy it again")
            file.seek(_LENGTH.size)
            text = file.read(length)
    except FileNotFoundError:
        raise TensorFileError(f"{path}: no such file") from None
    except OSError as error:
        raise TensorFileError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise TensorFileError(f"{str(path)!r}: not a possible file name") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise TensorFileError(f"{path}: not a safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise TensorFileError(f"{path}: not a safetensors file (its header is not a JSON object)")
    return header, _LENGTH.size + length, size


def _read_entry(value: object, where: str, path: Path, data_start: int, file_size: int) -> TensorEntry:
    try:
        fields = Fields(value, where)
        dtype = fields.text("dtype")
    except ZImageRuntimeError as error:
        raise TensorFileError(str(error)) from None
    shape, offsets = fields.raw("shape"), fields.raw("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorFileError(f"{where}: malformed shape or data_offsets in the header")
    nbytes = offsets[1] - offsets[0]
    if dtype in DType.__members__ and nbytes != math.prod(shape) * DType(dtype).size:
        raise TensorFileError(f"{where}: {nbytes} bytes do not make a {dtype} tensor of shape {tuple(shape)}")
    if data_start + offsets[1] > file_size:
        missing = data_start + offsets[1] - file_size
        raise TensorFileError(f"{path}: truncated: at least {missing} bytes are missing; download or copy it again")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > _MAX_RANK:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def encode_header(tensors: Mapping[str, tuple[DType, tuple[int, ...]]], alignment: int = 64) -> bytes:
    """The start of a file that holds these tensors in this order; padded so that the data starts aligned."""
    header: dict[str, object] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.size
        header[name] = {"dtype": dtype.value, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % alignment)
    return _LENGTH.pack(len(text)) + text


class TensorFile:
    """A file's tensors, memory-mapped: nothing is read before it is used."""

    def __init__(self, path: Path) -> None:
        """Raises `TensorFileError`."""
        self.path = path
        self.entries = read_header(path)
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r") if os.path.getsize(path) else None
        except OSError as error:
            raise TensorFileError(f"{path}: cannot be mapped: {error.strerror}") from None

    def array(self, name: str) -> tuple[NDArray[np.generic], DType]:
        """A view of a tensor's stored elements, and their type."""
        entry = self.entries.get(name)
        if entry is None or self._bytes is None:
            raise TensorFileError(f"{self.path}: has no tensor {name}")
        if entry.dtype not in DType.__members__:
            raise TensorFileError(f"{self.path}: {name}: {entry.dtype} is not supported")
        dtype = DType(entry.dtype)
        raw = self._bytes[entry.offset : entry.offset + entry.nbytes]
        return np.frombuffer(raw, dtype=dtype.storage).reshape(entry.shape), dtype
