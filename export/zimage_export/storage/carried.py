"""int8 weights that a file has already, carried into an int8 bundle as they are: no value is rounded a second time.

These are weights that were rotated before they were rounded (ConvRot). Their programs rotate the activations too. The
factors that folding and rebalancing would multiply them by cannot be applied to integers: powers of two go into the
scales, exactly, and a block with such a weight is not rebalanced.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.bundle.tensors import DType

from ..source.forms.scaled import INT8, ScaledTensor
from ..source.tensors import TensorSource
from ..source.weights import Weights
from .precision import scale_of
from .stored import StoredTensor

_READ = 256  # rows
_TURNED = 32  # rows: together with as many columns they stay in the processor's nearest cache
_PIECE_BYTES = 16 << 20


def rotation_of(source: TensorSource) -> int:
    """How many inputs were rotated together, for an int8 weight that can be carried; 0 for any other."""
    if isinstance(source, ScaledTensor) and source.codes == INT8 and source.has_row_scales:
        return source.rotation
    return 0


def carried(source: TensorSource, exponent: int = 0) -> list[StoredTensor]:
    """A weight's integers [in, out] and its scales [out] times 2**exponent, as an int8 bundle stores them."""
    assert isinstance(source, ScaledTensor)
    rows, width = source.shape

    def values() -> Iterator[NDArray[np.generic]]:
        turned = np.empty((width, rows), np.int8)
        for first in range(0, rows, _READ):
            read = source.integers(first, min(_READ, rows - first))
            for start in range(0, len(read), _TURNED):  # three times as fast as the whole matrix at once
                some = read[start : start + _TURNED]
                turned[:, first + start : first + start + len(some)] = some.T
        flat = turned.reshape(-1)  # in pieces, so that few whole tensors wait to be written
        yield from (flat[start : start + _PIECE_BYTES] for start in range(0, len(flat), _PIECE_BYTES))

    def scales() -> Iterator[NDArray[np.generic]]:
        yield source.row_scales() * np.float32(2.0**exponent)

    return [
        StoredTensor(source.name, DType.I8, (width, rows), values),
        StoredTensor(scale_of(source.name), DType.F32, (rows,), scales),
    ]


def rotated_linears(component: str, names: Iterable[str], weights: Weights) -> dict[str, int]:
    """The rotations of a component's linears, by `component/weight`."""
    found = {}
    for name in names:
        if name in weights and (size := rotation_of(weights.get(name))):
            found[f"{component}/{name}"] = size
    return found
