"""Altering a copy of a checkpoint, tensor by tensor, in its own files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zimage_export.source.checkpoint import Checkpoint, TensorSource
from zimage_export.storage.casts import encode
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
    stored = np.memmap(
        source.path, dtype=source.dtype.storage, mode="r+", offset=source.entry.offset, shape=source.shape
    )
    stored[...] = encode(values.astype(np.float32), source.dtype, source.name)
    stored.flush()
    # what was written is what was meant, but for the type's own rounding
    assert np.allclose(to_float32(np.asarray(stored), source.dtype), values, rtol=1e-2)
