"""Activations multiplied by the regular Hadamard matrix, for weights that were so before they were rounded (ConvRot).

The matrix of a group is orthogonal and symmetric, so x · Wᵀ = (x · H) · (W · H)ᵀ. It spreads a loud channel over its
group, which leaves more of the 8 bits to the others.

H of size a · b is the Kronecker product of those of sizes a and b. With a group as a matrix [a, b], the rotation is
H_a · X · H_b: on two cores of an EPYC it takes a half (1088 tokens of width 3840) to a third (width 10240) of the time
of the product with the whole matrix. GPUs get the whole matrix, which is one large product (not measured).
"""

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.model.hadamard import hadamard

from .builder import GraphBuilder

_FACTOR = 16


def rotate(b: GraphBuilder, x: str, size: int, width: int, *, whole: bool) -> str:
    """Rows [rows, width] float32 → the same, with each group of `size` channels multiplied by the matrix."""
    if whole or size <= _FACTOR:
        groups = b.op("Reshape", x, b.integers(-1, size), name="rotated.groups")
        turned = b.op("MatMul", groups, _matrix(b, size), name="rotated.groups.turned")
    else:
        rows = b.op("Reshape", x, b.integers(-1, _FACTOR), name="rotated.rows")
        rows = b.op("MatMul", rows, _matrix(b, _FACTOR), name="rotated.rows.turned")
        groups = b.op("Reshape", rows, b.integers(-1, size // _FACTOR, _FACTOR), name="rotated.groups")
        turned = b.op("MatMul", _matrix(b, size // _FACTOR), groups, name="rotated.groups.turned")
    return b.op("Reshape", turned, b.integers(-1, width), name="rotated")


def _matrix(b: GraphBuilder, size: int) -> str:
    matrix: NDArray[np.float32] = hadamard(size)
    return b.constant(matrix, f"hadamard_{size}")
