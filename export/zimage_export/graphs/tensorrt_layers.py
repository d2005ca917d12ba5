"""Layers in the forms that TensorRT fuses best; for programs whose weights are inputs.

What differs between layers that share a program is an input as well: the epsilon of a norm whose branch was divided by
a power of two, and the factors that keep fp16 in range.

W8A8: int8 weights come as [out, in] (a bundle stores [in, out]) with one float32 scale per output channel. A token is
quantized by its own largest magnitude. Both sides are dequantized by the *scalar* 2**-7, which TensorRT folds into one
Int8 x Int8 product; the true scales multiply its result in float32. With them inside the DequantizeLinear, the sum of
products would exceed fp16's range before it is scaled.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zimage_runtime.bundle.manifest import TENSORRT, extended
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.branches import down_input, factor_input, up_input
from zimage_runtime.model.linears import Linear
from zimage_runtime.model.norms import Norm

from ..storage.precision import scale_of
from .builder import GraphBuilder
from .layers import Layers
from .program_set import ProgramSet, TypePolicy

RANK = "rank"
"""The free dimension of the branches of an extended program."""

_DEQUANTIZED = -7  # exponent of the scalar scale
_LEVELS = 127.0
_TINY = 1e-30  # the least magnitude: a token of zeros stays zeros
_UNSEEN = -3e4  # a score whose exponential is 0 beside any other's, and which fp16 holds


@dataclass(frozen=True)
class TensorRtLayers(Layers):
    """Layers for TensorRT: a linear multiplies in the type that its weight comes in; int8 ones as W8A8."""

    def linear(self, x: str, linear: Linear) -> str:
        """A linear layer [..., in_width] → [..., out_width]."""
        y = self._changed(x, self._product(x, (linear,), linear.name), linear)
        if linear.bias:
            bias = self.b.cast(self.b.weight(f"{linear.name}.bias", (linear.out_width,)), self.b.type_of(y))
            y = self.b.op("Add", y, bias, name=f"{linear.name}.biased")
        return y

    def linears(self, x: str, linears: Sequence[Linear], name: str) -> Iterator[str]:
        """Linear layers of one value as one product, whose weight is one input: their tensors one after the other."""
        if any(linear.bias for linear in linears) or len({self._stored(linear) for linear in linears}) > 1:
            return super().linears(x, linears, name)
        y = self._product(x, linears, name)
        widths = self.b.integers(*(linear.out_width for linear in linears))
        parts = self.b.ops("Split", y, widths, name=f"{name}.apart", outputs=len(linears), axis=-1)
        return (self._changed(x, part, linear) for part, linear in zip(parts, linears, strict=True))

    def _changed(self, x: str, y: str, linear: Linear) -> str:
        """A layer's product with its factor and its low-rank branch, whose matrices are read as weights are.

        They come in the product's type. One free dimension, the rank, is that of all branches of a program.
        """
        if not self.extended:
            return y
        b, name, dtype = self.b, linear.name, self.b.type_of(y)
        full, x = b.full_name(name), b.cast(x, dtype)
        down = b.branch_input(down_input(full), (RANK, linear.in_width), dtype)
        up = b.branch_input(up_input(full), (linear.out_width, RANK), dtype)
        factor = b.branch_input(factor_input(full), (linear.out_width,), dtype)
        down = self._transposed(down, (-1, linear.in_width), f"{name}.lora.down")
        up = self._transposed(up, (linear.out_width, -1), f"{name}.lora.up")
        change = b.op("MatMul", b.op("MatMul", x, down, name=f"{name}.lora.small"), up, name=f"{name}.lora.change")
        y = b.op("Mul", y, factor, name=f"{name}.dora")
        return b.op("Add", y, change, name=f"{name}.lora")

    def _stored(self, linear: Linear) -> DType:
        return self.b.storage_of(linear.weight, (linear.out_width, linear.in_width))

    def _product(self, x: str, linears: Sequence[Linear], name: str) -> str:
        """A value times the transposed weights [out, in] of linears of one type, joined along their outputs.

        Transposed as the second operand of a batched product, a weight is read as it is; alone, it would be copied in
        each run. int8 weights are [out, in] too, whose products of a row with a row are what tensor cores multiply.
        """
        b, dtype = self.b, self._stored(linears[0])
        shape = (sum(linear.out_width for linear in linears), linears[0].in_width)
        weight = b.joined_weight(f"{name}.weight", [linear.weight for linear in linears], shape, dtype)
        if dtype is not DType.I8:
            return b.op("MatMul", b.cast(x, dtype), self._transposed(weight, shape, name), name=name)
        quantized, scale = self._quantized(x)
        weight = b.op("DequantizeLinear", weight, self._constant(2.0**_DEQUANTIZED), name=f"{name}.dequantized")
        b.typed(weight, self.compute)
        y = b.cast(b.op("MatMul", quantized, self._transposed(weight, shape, name), name=name), DType.F32)
        scales = b.joined_weight(
            scale_of(f"{name}.weight"), [scale_of(linear.weight) for linear in linears], shape[:1], DType.F32
        )
        scales = b.op("Mul", scales, b.number(2.0 ** (-2 * _DEQUANTIZED)), name=f"{name}.scales")
        y = b.op("Mul", b.op("Mul", y, scales, name=f"{name}.by_channel"), scale, name=f"{name}.by_token")
        return b.cast(y, self.compute)

    def _transposed(self, weight: str, shape: tuple[int, int], name: str) -> str:
        weight = self.b.op("Reshape", weight, self.b.integers(1, *shape), name=f"{name}.batched")
        return self.b.op("Transpose", weight, name=f"{name}.transposed", perm=[0, 2, 1])

    def _quantized(self, x: str) -> tuple[str, str]:
        """A value as int8 times 2**-7, in the compute type, and the factor of each token."""
        b = self.b
        x = b.cast(x, DType.F32)
        name = f"{x}.quantization"
        if b.has(f"{name}.value"):
            return f"{name}.value", f"{name}.scale"
        with b.outside():
            largest = b.op(
                "ReduceMax", b.op("Abs", x, name=f"{name}.abs"), b.integers(-1), name=f"{name}.max", keepdims=1
            )
            largest = b.op("Max", largest, b.number(_TINY), name=f"{name}.nonzero")
            scale = b.op("Mul", largest, b.number(1 / _LEVELS), name=f"{name}.scale")
            unit = b.op("Div", x, scale, name=f"{name}.unit")
            zero = b.constant(np.zeros((), np.int8), "int8_zero")
            int8 = b.op("QuantizeLinear", unit, b.number(1.0), zero, name=f"{name}.int8")
            value = b.op("DequantizeLinear", int8, self._constant(2.0**_DEQUANTIZED), name=f"{name}.value")
        b.typed(value, self.compute)
        return value, scale

    def _constant(self, value: float) -> str:
        """A scalar in the compute type."""
        return self.b.number(value, self.compute)

    def rows(self, x: str, width: int, name: str = "rows") -> str:
        """The value itself: products accept any leading dimensions."""
        return x

    def branch_norm(self, x: str, scale: str, epsilon: float, exponent: int, name: str) -> str:
        """The norm with its epsilon as an input, `<name>.epsilon`, as layers differ in it."""
        b = self.b
        x = b.cast(x, DType.F32)
        mean = b.op(
            "ReduceMean", b.op("Mul", x, x, name=f"{name}.square"), b.integers(-1), name=f"{name}.mean", keepdims=1
        )
        mean = b.op("Add", mean, b.scalar(f"{name}.epsilon", epsilon * 2.0 ** (-2 * exponent)), name=f"{name}.safe")
        x = b.op("Div", x, b.op("Sqrt", mean, name=f"{name}.root"), name=f"{name}.normalized")
        return b.op("Mul", x, scale, name=name)

    def head_norm(self, x: str, norm: Norm) -> str:
        """Normalizes each head: [..., heads * head_dim] → [..., heads, head_dim]."""
        dtype = self.b.type_of(x)
        heads = self.b.op("Reshape", x, self.b.integers(0, 0, -1, norm.width), name=f"{norm.name}.heads")
        scale = self.weight(norm.weight, (norm.width,))
        return self.b.cast(self.rms_norm(heads, scale, norm.epsilon, norm.name), dtype)

    def attention(self, q: str, k: str, v: str, heads: int, head_dim: int, name: str = "scores") -> str:
        """Full attention of [batch, tokens, heads * head_dim], in the three operators that TensorRT fuses to one.

        The `Attention` operator is fused too, but with a copy before and after it.
        """
        b = self.b
        q = self._heads(q, heads)
        k, v = self._keys_and_values(k, v, heads, name)
        k = b.op("Transpose", k, name=f"{name}.keys", perm=[0, 1, 3, 2])
        scores = b.op("MatMul", q, k, name=f"{name}.products")
        scores = b.op("Mul", scores, b.number(head_dim**-0.5, b.type_of(scores)), name=f"{name}.scaled")
        h = b.op("MatMul", b.op("Softmax", scores, name=f"{name}.softmax", axis=-1), v, name=name)
        h = b.op("Transpose", h, name=f"{name}.tokens", perm=[0, 2, 1, 3])
        return b.op("Reshape", h, b.integers(0, 0, -1), name=f"{name}.joined")

    def _keys_and_values(self, k: str, v: str, heads: int, name: str) -> list[str]:
        """Both as [batch, heads, tokens, head_dim], written by one kernel: values that are a part of a larger product
        would otherwise be copied by a kernel of their own."""
        b = self.b
        both = [b.op("Reshape", x, b.integers(0, 0, heads, -1), name=f"{x}.split") for x in (k, v)]
        joined = b.op("Concat", *both, name=f"{name}.shared", axis=2)
        joined = b.op("Transpose", joined, name=f"{name}.heads", perm=[0, 2, 1, 3])
        return b.ops("Split", joined, name=f"{name}.apart", outputs=2, axis=1, num_outputs=2)

    def causal_attention(
        self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int, name: str = "scores"
    ) -> str:
        """Causal attention in which `heads` queries share `kv_heads` keys and values, fused with its mask, with no
        copy before or after it.

        Measured with TensorRT for RTX 1.7.1, kernels of the layer and those among them that only move data: the
        `Attention` operator in any form 15 and 2 (the values before it, the result after it); these operators, keys
        and values repeated apart, 14 and 1 (the values); repeated together, 13 and 0, for the values are then written
        by the kernel that rotates the keys; queries of a group as rows of one head 14 and 1; with a dimension for
        the group, not fused.
        """
        b, dtype = self.b, self.b.type_of(q)
        shared = [b.op("Reshape", x, b.integers(0, 0, kv_heads, head_dim), name=f"{x}.split") for x in (k, v)]
        both = b.op("Concat", *shared, name=f"{name}.shared", axis=2)
        both = b.op("Reshape", both, b.integers(0, 0, 2 * kv_heads, 1, head_dim), name=f"{name}.groups")
        both = b.op("Expand", both, b.integers(1, 1, 1, heads // kv_heads, 1), name=f"{name}.repeated")
        both = b.op("Reshape", both, b.integers(0, 0, 2 * heads, head_dim), name=f"{name}.each")
        both = b.op("Transpose", both, name=f"{name}.heads", perm=[0, 2, 1, 3])
        k, v = b.ops("Split", both, name=f"{name}.apart", outputs=2, axis=1, num_outputs=2)
        k = b.op("Transpose", k, name=f"{name}.keys", perm=[0, 1, 3, 2])
        # the scale's power of two comes first, where it is exact and keeps products in fp16's range
        exponent = round(math.log2(head_dim) / 2)
        small = b.op("Mul", self._heads(q, heads), b.number(2.0**-exponent, dtype), name=f"{name}.queries")
        scores = b.op("MatMul", small, k, name=f"{name}.products")
        scores = b.op("Mul", scores, b.number(head_dim**-0.5 * 2**exponent, dtype), name=f"{name}.scaled")
        unseen = b.number(_UNSEEN, dtype)
        scores = b.typed(b.op("Where", self._seen(q), scores, unseen, name=f"{name}.masked"), dtype)
        h = b.op("MatMul", b.op("Softmax", scores, name=f"{name}.softmax", axis=-1), v, name=name)
        h = b.op("Transpose", h, name=f"{name}.tokens", perm=[0, 2, 1, 3])
        return b.op("Reshape", h, b.integers(0, 0, -1), name=f"{name}.joined")

    def _seen(self, x: str) -> str:
        """Which tokens each one of [batch, tokens, width] sees: booleans [tokens, tokens]."""
        b = self.b
        count = b.op("Squeeze", b.dim(x, 1, "seen.tokens"), name="seen.count")
        zero, one = (b.constant(np.array(value, np.int64), f"int64_scalar_{value}") for value in (0, 1))
        positions = b.op("Range", zero, count, one, name="seen.positions")
        return b.op(
            "GreaterOrEqual", b.op("Unsqueeze", positions, b.integers(1), name="seen.rows"), positions, name="seen"
        )

    def _heads(self, x: str, heads: int) -> str:
        """[batch, tokens, heads * head_dim] → [batch, heads, tokens, head_dim]."""
        x = self.b.op("Reshape", x, self.b.integers(0, 0, heads, -1), name=f"{x}.split")
        return self.b.op("Transpose", x, name=f"{x}.heads", perm=[0, 2, 1, 3])

    def scaled(self, x: str, exponent: int, name: str) -> str:
        """x times 2**exponent. Of a float32 value, the factor is an input, `<name>`; a 16-bit one is never worth the
        kernel that converts it, and a layer that needs another factor gets a program of its own."""
        if self.b.type_of(x) is not DType.F32:
            return super().scaled(x, exponent, name)
        return self.b.op("Mul", x, self.b.scalar(name, 2.0**exponent), name=f"{name}.scaled")

    def rotary(self, x: str, cos: str, sin: str, heads: int, name: str, *, interleaved: bool) -> str:
        """Rotary embedding; as in `Layers`, but without the empty input that TensorRT's parser refuses."""
        dtype = self.b.type_of(x)
        tables = [self.b.cast(table, dtype) for table in (cos, sin)]
        return self.b.op("RotaryEmbedding", x, *tables, name=name, interleaved=int(interleaved), num_heads=heads)

    def group_norm(self, x: str, norm: Norm) -> str:
        """Group norm of a map [batch, width, height, width], in float32, in one pass to measure and one to apply.

        The variance is the mean of squares less the square of the mean: with distances to the mean, TensorRT writes
        the whole map in float32 twice.
        """
        return self._scaled(x, self.group_factors(x, norm, 2, 3), norm, (-1, norm.width, 1, 1))

    def group_factors(self, x: str, norm: Norm, *axes: int) -> tuple[str, str]:
        """What a group norm multiplies by and adds, by group and channel. `axes` are those of the positions."""
        b, x = self.b, self.b.cast(x, DType.F32)
        name, width, groups = norm.name, norm.width, norm.groups
        grouped = b.integers(0, groups, width // groups)
        means = []
        for kind, values in (("mean", x), ("square", b.op("Mul", x, x, name=f"{name}.squares"))):
            h = b.op("ReduceMean", values, b.integers(*axes), name=f"{name}.{kind}.channels", keepdims=0)
            h = b.op("Reshape", h, grouped, name=f"{name}.{kind}.groups")
            means.append(b.op("ReduceMean", h, b.integers(2), name=f"{name}.{kind}", keepdims=1))
        mean, square = means
        variance = b.op("Sub", square, b.op("Mul", mean, mean, name=f"{name}.mean_square"), name=f"{name}.difference")
        variance = b.op("Max", variance, b.number(0.0), name=f"{name}.variance")
        deviation = b.op(
            "Sqrt", b.op("Add", variance, b.number(norm.epsilon), name=f"{name}.safe"), name=f"{name}.deviation"
        )
        weight, bias = (
            b.op(
                "Reshape",
                b.weight(f"{name}.{kind}", (width,)),
                b.integers(1, groups, width // groups),
                name=f"{name}.{kind}.grouped",
            )
            for kind in ("weight", "bias")
        )
        factor = b.op("Div", weight, deviation, name=f"{name}.factor")
        shift = b.op("Sub", bias, b.op("Mul", mean, factor, name=f"{name}.mean_factor"), name=f"{name}.shift")
        return factor, shift

    def _scaled(self, x: str, factors: tuple[str, str], norm: Norm, shape: tuple[int, ...]) -> str:
        """A value times the factors of a group norm, which are brought into a shape."""
        b, dtype = self.b, self.b.type_of(x)
        factor, shift = (b.cast(b.op("Reshape", h, b.integers(*shape), name=f"{h}.column"), dtype) for h in factors)
        return b.op("Add", b.op("Mul", x, factor, name=f"{norm.name}.scaled"), shift, name=norm.name)

    def banded_attention(self, positions: str, band: str, norm: Norm, linears: Sequence[Linear]) -> str:
        """The autoencoder's attention for some of its positions: [1, positions, width] and [1, queries, width] of them.

        TensorRT does not fuse a head of 512 channels, so it stores scores. With all queries, those of 2048 x 2048
        pixels take 17 GB. In blocks within one program, TensorRT computes all products before the first softmax.
        """
        b, width = self.b, norm.width
        query, key, value, out = linears
        factors = self.group_factors(positions, norm, 1)
        given, attended = (self._scaled(x, factors, norm, (1, 1, width)) for x in (band, positions))
        k = b.op("Transpose", self.linear(attended, key), name="keys", perm=[0, 2, 1])
        scores = b.op("MatMul", self.linear(given, query), k, name="scores.products")
        scores = b.op("Mul", scores, b.number(width**-0.5, b.type_of(scores)), name="scores.scaled")
        h = b.op(
            "MatMul",
            b.op("Softmax", scores, name="scores.softmax", axis=-1),
            self.linear(attended, value),
            name="scores",
        )
        return b.op("Add", band, b.cast(self.linear(h, out), b.type_of(band)), name="residual")


def _layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return TensorRtLayers(b, policy.gpu_compute(b.program.component))


def _extended_layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return TensorRtLayers(b, policy.gpu_compute(b.program.component), extended=True)


TENSORRT_PROGRAMS = ProgramSet(TENSORRT, _layers, ())  # block programs alone: see `engines`
TENSORRT_EXTENDED = ProgramSet(extended(TENSORRT), _extended_layers, (), variant_of=TENSORRT, extended=True)
