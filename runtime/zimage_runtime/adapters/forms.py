"""The forms that a change of a weight [out, in] has in a file, and what each is as a whole.

Values stay in the file until they are used, in its own type; all arithmetic is in float32.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..arrays import FloatArray
from ..bundle.tensors import DType, TensorFile, to_float32
from .kronecker import ProductSum, Sizes


@dataclass(frozen=True)
class Values:
    """A tensor of a file, or a range of its rows."""

    file: TensorFile
    name: str
    shape: tuple[int, ...]
    first: int = 0

    @classmethod
    def of(cls, file: TensorFile, name: str) -> "Values":
        """The whole tensor. Trailing axes of a convolution over single pixels are left out."""
        shape = file.entries[name].shape
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        return cls(file, name, shape)

    @property
    def whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.shape[:1] == self.file.entries[self.name].shape[:1]

    def part(self, index: int, parts: int) -> "Values":
        """One of several equal ranges of its rows."""
        rows = self.shape[0] // parts
        return replace(self, shape=(rows, *self.shape[1:]), first=self.first + index * rows)

    def rows(self, start: int, stop: int) -> FloatArray:
        """Some of its rows."""
        values, dtype = self._stored()
        return to_float32(values[self.first + start : self.first + stop].reshape(-1, *self.shape[1:]), dtype)

    def read(self) -> FloatArray:
        """All of it."""
        if not self.shape:
            return to_float32(*self._stored())
        return self.rows(0, self.shape[0])

    def _stored(self) -> tuple[NDArray[Any], DType]:
        return self.file.array(self.name)


class Form(Protocol):
    """A change of a weight, without its scale."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows of the change, in float32."""

    def part(self, index: int, parts: int) -> "Form":
        """One of several equal ranges of its rows."""


@dataclass(frozen=True)
class LowRank:
    """LoRA: up [out, rank] times down [rank, in]."""

    up: Values
    down: Values

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Of the product, at most."""
        return self.down.shape[0]

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows of the change."""
        return self.up.rows(start, stop) @ self.down.read()

    def part(self, index: int, parts: int) -> "LowRank":
        """One of several equal ranges of its rows."""
        return replace(self, up=self.up.part(index, parts))

    def factors(self) -> tuple[FloatArray, FloatArray]:
        """Up and down, without columns of up that are zero: of a block-diagonal matrix, a part has many."""
        up, down = self.up.read(), self.down.read()
        if self.up.whole:
            return up, down
        used = up.any(axis=0)
        return (up, down) if used.all() else (up[:, used], down[used])


@dataclass(frozen=True)
class Hadamard:
    """LoHa: (w1_a @ w1_b) ∘ (w2_a @ w2_b), which is a product of the rank r1 r2."""

    w1_a: Values  # [out, r1]
    w1_b: Values  # [r1, in]
    w2_a: Values
    w2_b: Values

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def rank(self) -> int:
        """Of the product of both."""
        return self.w1_b.shape[0] * self.w2_b.shape[0]

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows of the change."""
        product: FloatArray = self.w1_a.rows(start, stop) @ self.w1_b.read()
        product *= self.w2_a.rows(start, stop) @ self.w2_b.read()
        return product

    def part(self, index: int, parts: int) -> "Hadamard":
        """One of several equal ranges of its rows."""
        return replace(self, w1_a=self.w1_a.part(index, parts), w2_a=self.w2_a.part(index, parts))

    def factors(self) -> tuple[FloatArray, FloatArray]:
        """The same as up [out, r1 r2] and down [r1 r2, in]."""
        a, b, c, d = (values.read() for values in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        up = (a[:, :, None] * c[:, None, :]).reshape(len(a), -1)
        down = (b[:, None, :] * d[None, :, :]).reshape(-1, b.shape[1])
        return up, down


@dataclass(frozen=True)
class Factor:
    """A side of a Kronecker product: whole, or itself a product."""

    whole: Values | None = None
    a: Values | None = None
    b: Values | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        if self.whole is not None:
            return self.whole.shape
        assert self.a is not None
        assert self.b is not None
        return self.a.shape[0], self.b.shape[1]

    @property
    def rank(self) -> int | None:
        """Of a product; None for a whole one."""
        return None if self.b is None else self.b.shape[0]

    def read(self) -> FloatArray:
        """Its values."""
        if self.whole is not None:
            return self.whole.read()
        assert self.a is not None
        assert self.b is not None
        product: FloatArray = self.a.read() @ self.b.read()
        return product


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of w1 [a, b] and w2 [c, d], or one of several equal ranges of its rows."""

    w1: Factor
    w2: Factor
    first: int = 0
    count: int | None = None  # rows; None for all

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, or of its rows that it is."""
        (a, b), (c, d) = self.w1.shape, self.w2.shape
        return (a * c if self.count is None else self.count), b * d

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows of the change."""
        w1, w2 = self.w1.read(), self.w2.read()
        index = np.arange(self.first + start, self.first + stop)
        outer, inner = w1[index // len(w2)], w2[index % len(w2)]
        product: FloatArray = (outer[:, :, None] * inner[:, None, :]).reshape(len(index), -1)
        return product

    def part(self, index: int, parts: int) -> "Kronecker":
        """One of several equal ranges of its rows."""
        rows = self.shape[0] // parts
        return replace(self, first=self.first + index * rows, count=rows)

    @property
    def sizes(self) -> Sizes:
        """Of `products`."""
        (a, b), (c, d) = self.w1.shape, self.w2.shape
        whole = Sizes(1, a, b, c, d).refined(a * self._cuts, b)
        return whole._replace(a=self.shape[0] // whole.c)

    def products(self) -> ProductSum:
        """The same as a sum of products: a single one, unless the range of rows begins or ends within w2."""
        w1, w2 = self.w1.read(), self.w2.read()
        whole = ProductSum(w1[None], w2[None]).refined(len(w1) * self._cuts, w1.shape[1])
        rows = whole.inner.shape[1]
        return ProductSum(whole.outer[:, self.first // rows : (self.first + self.shape[0]) // rows], whole.inner)

    @property
    def _cuts(self) -> int:
        """Into how many blocks of rows w2 falls, so that the range of rows is made of whole ones."""
        rows = self.w2.shape[0]
        return rows // math.gcd(rows, self.first, self.shape[0])


@dataclass(frozen=True)
class Whole:
    """The change itself, of any shape."""

    values: Values

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows of the change."""
        return self.values.rows(start, stop)

    def part(self, index: int, parts: int) -> "Whole":
        """One of several equal ranges of its rows."""
        return Whole(self.values.part(index, parts))
