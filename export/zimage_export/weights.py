"""Streaming tensors from a checkpoint's shards into a bundle's weight files, a piece at a time.

A precision decides for each tensor how it is stored. The writer knows nothing of precisions: it takes tensors that
know their name, type and shape, and that produce their bytes when asked.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.contracts import COMPONENTS
from zimage_runtime.manifest import FileRecord
from zimage_runtime.progress import Advance
from zimage_runtime.tensors import DType, encode_header, to_float32

from .ahead import ahead
from .casts import encode
from .checkpoint import Checkpoint, TensorSource
from .graphs import Graph
from .graphs.folds import Folds, weight_exponent
from .precision import StoragePolicy

EMBEDDINGS = "embed_tokens.weight"

_CHUNK_BYTES = 16 << 20
_PIECES_AHEAD = 3


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the bundle stores it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[NDArray[np.generic]]]  # its elements in order, in pieces of bounded size

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.size


def converted(source: TensorSource, dtype: DType, exponent: int = 0) -> StoredTensor:
    """A tensor times 2**exponent, in another element type; as it is where nothing changes."""

    def chunks() -> Iterator[NDArray[np.generic]]:
        if dtype is source.dtype and exponent == 0:
            yield from source.chunks(_CHUNK_BYTES)
            return
        for piece in source.chunks(_CHUNK_BYTES):
            values = to_float32(piece, source.dtype)
            if exponent:  # a product with a power of two is exact, and ten times faster than ldexp
                values = values * np.float32(2.0**exponent)
            yield encode(values, dtype, source.name)

    return StoredTensor(source.name, dtype, source.shape, chunks)


def plan_weights(
    checkpoint: Checkpoint, graphs: Iterable[Graph], policy: StoragePolicy, folds: Mapping[str, Folds]
) -> dict[str, list[StoredTensor]]:
    """The tensors of each component's weights file, which are those that its programs use.

    Raises `CheckpointError` if the checkpoint lacks one, or has it in another shape or an unusable type. Nothing is
    read but headers, so a bad checkpoint fails before anything is written.
    """
    plan: dict[str, dict[str, StoredTensor]] = {component: {} for component in COMPONENTS}
    for graph in graphs:
        component = graph.program.component
        for name, shape in graph.weights.items():
            source = checkpoint.weights(component).get(name, shape)
            dtype = policy.storage(component, name, shape)
            plan[component][name] = converted(source, dtype, weight_exponent(folds.get(component, {}), name))
    return {component: list(tensors.values()) for component, tensors in plan.items()}


def plan_embeddings(checkpoint: Checkpoint) -> list[StoredTensor]:
    """The token embeddings, kept as stored in every precision: the host reads a few rows of them a prompt."""
    config = checkpoint.config.text_encoder
    source = checkpoint.text_encoder.get(EMBEDDINGS, (config.vocab_size, config.hidden_size))
    return [converted(source, source.dtype)]


def total_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes of several tensors' data."""
    return sum(tensor.nbytes for tensor in tensors)


def write_weights(path: Path, tensors: Iterable[StoredTensor], advance: Advance) -> FileRecord:
    """Writes a safetensors file, hashed as it is written. `advance` is told the bytes of each piece.

    Reading and converting run in a second thread, a few pieces ahead of hashing and writing.
    """
    tensors = list(tensors)
    header = encode_header({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    digest = hashlib.sha256(header)
    size = len(header)
    with path.open("wb") as file:
        file.write(header)
        with contextlib.closing(ahead(_pieces(tensors), _PIECES_AHEAD)) as pieces:
            for data in pieces:
                file.write(data)
                digest.update(data)
                size += data.nbytes
                advance(data.nbytes)
    return FileRecord(size, digest.hexdigest())


def _pieces(tensors: Iterable[StoredTensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        for piece in tensor.chunks():
            yield np.ascontiguousarray(piece, dtype=tensor.dtype.storage).reshape(-1).view(np.uint8).data
