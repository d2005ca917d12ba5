"""Streaming tensors from a checkpoint's shards into a bundle's weight files, in pieces of bounded size.

A precision decides how each tensor is stored. The writer is independent of precisions: it is given tensors with a
name, a type and a shape that produce their bytes on demand.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.bundle.manifest import FileRecord, Precision
from zimage_runtime.bundle.rebalancing import Factors
from zimage_runtime.bundle.tensors import DType, encode_header, to_float32
from zimage_runtime.command_line.progress import Advance
from zimage_runtime.model.linears import EMBEDDINGS
from zimage_runtime.model.programs import COMPONENTS

from ..graphs import Graph
from ..source.checkpoint import Checkpoint
from ..source.tensors import TensorSource
from ..source.weights import Weights
from ..storage.carried import carried
from ..storage.casts import encode
from ..storage.feedback import Moments
from ..storage.folds import Folds, block_of, weight_exponent
from ..storage.precision import SCALE_SUFFIX, Encoding, StoragePolicy, linear_shape
from ..storage.quantize import quantized
from ..storage.stored import LazyFactors, StoredTensor, row_chunks
from .folding import Peaks
from .prefetch import ahead
from .rebalance import Rebalancing, measured_moments

_CHUNK_BYTES = 16 << 20
_PIECES_AHEAD = 3


def converted(
    source: TensorSource, dtype: DType, exponent: int = 0, factors: LazyFactors | None = None
) -> StoredTensor:
    """A tensor times 2**exponent, in another element type; as it is where nothing changes.

    `factors` are computed when they are first needed.
    """

    def chunks() -> Iterator[NDArray[np.generic]]:
        if factors is not None:
            yield from multiplied(factors())
            return
        if dtype is source.dtype and exponent == 0:
            yield from source.chunks(_CHUNK_BYTES)
            return
        for piece in source.chunks(_CHUNK_BYTES):
            values = to_float32(piece, source.dtype)
            if exponent:  # a product with a power of two is exact, and ten times faster than ldexp
                values = values * np.float32(2.0**exponent)
            yield encode(values, dtype, source.name)

    def multiplied(by: Factors) -> Iterator[NDArray[np.generic]]:
        power = np.float32(2.0**exponent)
        pieces = row_chunks(source, by) if len(source.shape) == 2 else [(0, by.apply(source.read()))]
        for _, values in pieces:
            yield encode(values * power, dtype, source.name)

    return StoredTensor(source.name, dtype, source.shape, chunks)


def plan_weights(
    checkpoint: Checkpoint,
    graphs: Iterable[Graph],
    policy: StoragePolicy,
    folds: Mapping[str, Folds],
    balance: Rebalancing | None = None,
    peaks: Peaks | None = None,
) -> dict[str, list[StoredTensor]]:
    """The tensors of each component's weights file, which are those that its programs use.

    `peaks` are what calibration measured; int4 is rounded with error feedback where it measured moments.
    Raises `CheckpointError` if the checkpoint lacks one, or has it in another shape or an unusable type. Only
    headers are read, so a bad checkpoint fails before anything is written.
    """
    plan: dict[str, dict[str, StoredTensor]] = {component: {} for component in COMPONENTS}
    for graph in graphs:
        component = graph.program.component
        weights, exponents = checkpoint.weights(component), folds.get(component, {})
        for stored, shape in graph.weights.items():
            name = stored.removesuffix(SCALE_SUFFIX)
            if name in plan[component]:
                continue
            factors = balance.factors(component, name) if balance else None
            moments = measured_moments(peaks, component, name)
            exponent = weight_exponent(exponents, name)
            tensors = stored_tensors(weights, policy, component, name, shape, exponent, factors, moments)
            plan[component].update({tensor.name: tensor for tensor in tensors})
    return {component: by_block(tensors) for component, tensors in plan.items()}


def stored_tensors(
    weights: Weights,
    policy: StoragePolicy,
    component: str,
    name: str,
    shape: tuple[int, ...],
    exponent: int = 0,
    factors: LazyFactors | None = None,
    moments: Moments | None = None,
) -> list[StoredTensor]:
    """A tensor of a component times 2**exponent and its factors, as its policy stores it. `shape` is the stored one.

    Raises `CheckpointError` for one that is missing or has another shape.
    """
    encoding = policy.encoding(component, name)
    if encoding is Encoding.INT8 and policy.rotation(component, name):
        return carried(weights.get(name, linear_shape(shape, encoding)), exponent)
    if encoding is Encoding.FLOAT:
        source = weights.get(name, shape)
        return [converted(source, policy.storage(component, name, shape), exponent, factors)]
    source = weights.get(name, linear_shape(shape, encoding))
    return quantized(source, encoding, factors, exponent, moments)


def by_block(tensors: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """In the order of the programs, with a block's tensors together, as they are read together."""
    places: dict[str, int] = {}
    for name in tensors:
        places.setdefault(block_of(name), len(places))
    return sorted(tensors.values(), key=lambda tensor: places[block_of(tensor.name)])


def plan_embeddings(checkpoint: Checkpoint, policy: StoragePolicy) -> list[StoredTensor]:
    """The token embeddings, stored as published in every precision: the host reads a few rows per prompt.

    Quantized ones, which float32 holds exactly, are rounded to fp16 unless the bundle is float32: its steps are finer
    than theirs, and it halves the largest tensor of the bundle.
    """
    config = checkpoint.config.text_encoder
    source = checkpoint.text_encoder.get(EMBEDDINGS, (config.vocab_size, config.hidden_size))
    rounded = source.quantized and policy.precision is not Precision.FP32
    return [converted(source, DType.F16 if rounded else source.dtype)]


def write_weights(path: Path, tensors: Iterable[StoredTensor], advance: Advance) -> FileRecord:
    """Writes a safetensors file, hashed as it is written. `advance` is called with the bytes of each piece.

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
