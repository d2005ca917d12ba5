"""Rounding with error feedback: what rounding one weight adds to an output is taken back by its neighbours.

A row's weights are rounded one after another. The error that a rounded one leaves in the output is made up for by the
weights that are still to be rounded, as far as their inputs vary with its own (GPTQ, arXiv 2210.17323). How inputs vary
together is measured: the means of x_i · x_j within groups of `GROUP` neighbouring inputs, which is bounded memory for
inputs of any width. Scales stay as they would be without feedback, and the stored form does not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray

GROUP = 256
"""Inputs that make up for each other's errors. The last group of a width may be smaller."""

_DAMPING = 0.01  # of the diagonal's mean, added to it: a few thousand tokens do not tell all directions apart
_AT_ONCE = 32  # inputs after whose rounding the rest of the group is corrected, in one product

Moments = Sequence[FloatArray]
"""For each group of a linear's inputs, [size, size]: the means of the products of any two of them."""


def group_slices(width: int) -> list[slice]:
    """The groups of a linear's inputs."""
    return [slice(first, min(first + GROUP, width)) for first in range(0, width, GROUP)]


@dataclass(frozen=True)
class _Group:
    order: NDArray[np.intp]  # inputs of the group by falling magnitude: those with most effect are rounded first
    upper: FloatArray  # [size, size]: of the inverse moments' Cholesky decomposition, in that order


@dataclass(frozen=True)
class Feedback:
    """How the inputs of one weight make up for each other."""

    groups: tuple[_Group, ...]

    @classmethod
    def of(cls, moments: Moments, columns: FloatArray | None = None) -> Self:
        """From measured moments. `columns` [width] is what the weight's columns, and so its inputs' inverses, are
        multiplied by."""
        groups, first = [], 0
        for measured in moments:
            moment = measured.astype(np.float64)
            if columns is not None:
                factors = columns[first : first + len(moment)].astype(np.float64)
                moment /= np.outer(factors, factors)
            groups.append(_group(moment))
            first += len(moment)
        return cls(tuple(groups))

    def rounded(self, weights: FloatArray, steps: FloatArray, least: int, most: int) -> FloatArray:
        """Rows [rows, width] in units of `steps` [rows, width] → integers from `least` to `most`."""
        found, first = np.empty_like(weights), 0
        for group in self.groups:
            own = np.arange(first, first + len(group.order))[group.order]
            found[:, own] = _in_turn(weights[:, own].T.copy(), steps[:, own].T.copy(), group.upper, least, most).T
            first += len(own)
        return found


def _group(moment: NDArray[np.float64]) -> _Group:
    diagonal = np.diag(moment)
    order = np.argsort(-diagonal, kind="stable")
    damping = _DAMPING * float(diagonal.mean()) or 1.0  # inputs that are always zero have nothing to make up for
    damped = moment[np.ix_(order, order)] + damping * np.eye(len(moment))
    return _Group(order, np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32))


def _in_turn(left: FloatArray, steps: FloatArray, upper: FloatArray, least: int, most: int) -> FloatArray:
    """Inputs [size, rows], which are overwritten, → their integers."""
    found = np.empty_like(left)
    for start in range(0, len(left), _AT_ONCE):
        end = min(start + _AT_ONCE, len(left))
        errors = np.empty((end - start, left.shape[1]), np.float32)
        for index in range(start, end):
            np.rint(left[index] / steps[index], out=found[index])
            np.clip(found[index], least, most, out=found[index])
            error = errors[index - start]
            np.subtract(left[index], found[index] * steps[index], out=error)
            error /= upper[index, index]
            left[index + 1 : end] -= upper[index, index + 1 : end, None] * error
        left[end:] -= upper[start:end, end:].T @ errors
    return found
