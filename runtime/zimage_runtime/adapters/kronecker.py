"""Kronecker products of several files for one layer, joined into a sum of products of one size.

(w1 ⊗ w2) with w2 in blocks is Σ (w1 ⊗ E_pq) ⊗ block_pq, where E_pq has a single one: so a product can be stated with a
larger outer and a smaller inner factor, exactly. Where that takes longer than the layer itself, the sum is one matrix.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..arrays import FloatArray


class Sizes(NamedTuple):
    """Of a sum of products of [a, b] and [c, d]."""

    terms: int
    a: int
    b: int
    c: int
    d: int

    @property
    def elements(self) -> int:
        """Of all factors."""
        return self.terms * (self.a * self.b + self.c * self.d)

    @property
    def products(self) -> int:
        """Multiplications for one row of activations."""
        return self.terms * self.c * self.b * (self.d + self.a)

    def refined(self, a: int, b: int) -> "Sizes":
        """The same sum with outer factors [a, b], multiples of these."""
        n, m = a // self.a, b // self.b
        return Sizes(self.terms * n * m, a, b, self.c // n, self.d // m)


class ProductSum(NamedTuple):
    """Σ_k outer[k] ⊗ inner[k]."""

    outer: FloatArray  # [terms, a, b]
    inner: FloatArray  # [terms, c, d]

    @property
    def sizes(self) -> Sizes:
        """Its own."""
        return Sizes(*self.outer.shape, *self.inner.shape[1:])

    def refined(self, a: int, b: int) -> "ProductSum":
        """The same sum with outer factors [a, b], multiples of these."""
        terms, old_a, old_b = self.outer.shape
        n, m = a // old_a, b // old_b
        if (n, m) == (1, 1):
            return self
        c, d = self.inner.shape[1] // n, self.inner.shape[2] // m
        inner = self.inner.reshape(terms, n, c, m, d).transpose(0, 1, 3, 2, 4).reshape(-1, c, d)
        outer = np.zeros((terms, n, m, old_a, n, old_b, m), np.float32)
        for p in range(n):
            for q in range(m):
                outer[:, p, q, :, p, :, q] = self.outer
        return ProductSum(outer.reshape(-1, a, b), inner)

    def whole(self) -> FloatArray:
        """The sum as one matrix [a c, b d]."""
        terms, a, b, c, d = self.sizes
        found = np.zeros((a, c, b, d), np.float32)
        for k in range(terms):
            found += self.outer[k][:, None, :, None] * self.inner[k][None, :, None, :]
        return found.reshape(a * c, b * d)


def joined_sizes(parts: Sequence[Sizes], *, whole: bool = False) -> Sizes:
    """Of the sum that `joined` makes; one matrix, if `whole`."""
    a, b = math.lcm(*(one.a for one in parts)), math.lcm(*(one.b for one in parts))
    refined = [one.refined(a, b) for one in parts]
    found = refined[0]._replace(terms=sum(one.terms for one in refined))
    matrix = Sizes(1, 1, 1, found.a * found.c, found.b * found.d)
    return matrix if whole or (len(parts) > 1 and found.products > matrix.products) else found


def joined(parts: Iterable[tuple[ProductSum, FloatArray | None]], sizes: Sizes) -> ProductSum:
    """The sum of all, of the sizes that `joined_sizes` says.

    Rows of a part are multiplied by factors [out] where it has some, which only one matrix can have.
    """
    given = list(parts)
    if (sizes.a, sizes.b) == (1, 1):
        total = np.zeros((sizes.c, sizes.d), np.float32)
        for part, rows in given:
            total += part.whole() if rows is None else part.whole() * rows[:, None]
        return ProductSum(np.ones((1, 1, 1), np.float32), total[None])
    assert all(rows is None for _, rows in given)
    refined = [part.refined(sizes.a, sizes.b) for part, _ in given]
    return ProductSum(np.concatenate([one.outer for one in refined]), np.concatenate([one.inner for one in refined]))
