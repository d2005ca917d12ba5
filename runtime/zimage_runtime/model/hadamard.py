"""The matrix by which some int8 weights were rotated before they were rounded (ConvRot)."""

import functools

import numpy as np

from ..arrays import FloatArray

_FOUR = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)


@functools.cache
def hadamard(size: int) -> FloatArray:
    """[size, size]: the regular Hadamard matrix of a power of four, orthogonal and symmetric."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, _FOUR)
    return matrix / np.float32(np.sqrt(size))


def rotated(rows: FloatArray, size: int) -> FloatArray:
    """Rows [rows, width] with each group of `size` channels multiplied by the matrix, which is its own inverse."""
    return np.asarray(rows.reshape(-1, size) @ hadamard(size)).reshape(rows.shape)
