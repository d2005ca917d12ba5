"""Altering a copy of a checkpoint, tensor by tensor, in its own files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zimage_export.source.checkpoint import Checkpoint
from zimage_export.source.tensors import PlainTensor, TensorSource
from zimage_export.storage.casts import encode
from zimage_runtime.bundle.rebalancing import PLACES
from zimage_runtime.bundle.tensors import to_float32


def altered_copy(
    checkpoint: Path,
    out: Path,
    component: str,
    change: Callable[[str, NDArray[np.float32]], NDArray[np.float32] | None],
) -> Path:
    """Copies a checkpoint and rewrites the tensors of one component for which `change` returns values."""
    shutil.copytree(checkpoint, out)
    weights = Checkpoint.open(out).weights(component)
    for name in weights.names():
        source = weights.get(name)
        changed = change(name, source.read())
        if changed is not None:
            _overwrite(source, changed)
    return out


def _overwrite(source: TensorSource, values: NDArray[np.float32]) -> None:
    assert isinstance(source, PlainTensor)
    stored = np.memmap(
        source.path, dtype=source.dtype.storage, mode="r+", offset=source.entry.offset, shape=source.shape
    )
    stored[...] = encode(values.astype(np.float32), source.dtype, source.name)
    stored.flush()
    # what was written is what was meant, but for the type's own rounding
    assert np.allclose(to_float32(np.asarray(stored), source.dtype), values, rtol=1e-2)


OUTLIERS, LOUDER = 4, 50.0
"""How many channels of each activation are louder than the others, and how much."""


def with_loud_channels(checkpoint: Path, out: Path) -> Path:
    """The same model, in which some channels of all four activations of each block of the transformer are outliers."""
    makers = {place.maker for place in PLACES["transformer"]}
    readers = {reader: place for place in PLACES["transformer"] for reader in place.readers}

    def channels(block: str, maker: str, width: int) -> NDArray[np.int64]:
        return np.random.default_rng([len(maker), sum(block.encode())]).permutation(width)[:OUTLIERS]

    def louder(name: str, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        block = ".".join(name.split(".")[:2])
        tail = name.removeprefix(f"{block}.")
        if tail not in makers and tail not in readers:
            return None
        values = values.copy()
        if tail in readers:  # the columns make up for it, so that the model generates the same image
            values[:, channels(block, readers[tail].maker, values.shape[1])] /= LOUDER
        if tail in makers:
            values[channels(block, tail, len(values))] *= LOUDER
        return values

    return altered_copy(checkpoint, out, "transformer", louder)
