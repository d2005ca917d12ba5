"""The layers that all components consist of, as the CPU runs them best; other executors override what differs.

The CPU uses `Gemm` on two-dimensional operands, which takes weights as published ([out, in]); fused
`RMSNormalization` and `RotaryEmbedding`; and an attention that never stores the [tokens, tokens] scores.

Activations are [batch, tokens, width]; `shape` arguments are int64 vectors of that shape. Linears multiply in the
`compute` type; norms and everything that is added to the residual stream are float32. Values are cast only where types
differ, so in float32 nowhere.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.branches import (
    columns_input,
    down_input,
    factor_input,
    inner_input,
    outer_input,
    rows_input,
    up_input,
)
from zimage_runtime.model.linears import Linear
from zimage_runtime.model.norms import Norm

from .builder import GraphBuilder

_JOINED = 7
"""Values that one `Concat` reads. WebGPU binds 8 buffers on every adapter and more on some; where there are more
values, ONNX Runtime joins them in several passes, which is right only along the first axis that is not 1."""


@dataclass(frozen=True)
class Layers:
    """Layers for the CPU. Weights are named by the builder's scope."""

    b: GraphBuilder
    compute: DType = DType.F32
    position_blocks: int = 1  # of queries of the autoencoder's attention, where the operator stores scores
    extended: bool = False  # linears have branches, whose matrices are inputs (see `model.branches`)
    hints: DType = DType.F32  # the type of what a ControlNet adds to the residual stream

    def weight(self, name: str, shape: tuple[int, ...], dtype: DType = DType.F32) -> str:
        """A tensor of the weights file, cast to an element type."""
        return self.b.cast(self.b.weight(name, shape), dtype)

    def linear(self, x: str, linear: Linear) -> str:
        """A linear layer on rows [rows, in_width] → [rows, out_width], with its branch where there are branches."""
        y = self.plain_linear(x, linear)
        return self.branch(x, y, linear) if self.extended else y

    def branch(self, x: str, y: str, linear: Linear, *, scale: tuple[str, str] | None = None) -> str:
        """Adds a layer's branches to its output y, in y's type.

        `scale` is an operator, `Mul` or `Div`, and what it scales each row [rows, 1] of the branches by. Where there
        are no branches, one channel of zeros is added to all of y's: a single pass over it.
        """
        b, name, dtype = self.b, linear.name, self.b.type_of(y)
        full, x = b.full_name(name), b.cast(x, dtype)
        rank = f"{full}.rank"
        down = b.cast(b.branch_input(down_input(full), (rank, linear.in_width)), dtype)
        up = b.cast(b.branch_input(up_input(full), (f"{full}.out", rank)), dtype)
        small = b.op("Gemm", x, down, name=f"{name}.lora.down", transB=1)
        if scale is not None:
            small = b.op(scale[0], small, scale[1], name=f"{name}.lora.scaled")
        change = b.op("Gemm", small, up, self._kronecker(x, linear, scale), name=f"{name}.lora.up", transB=1)
        return b.typed(b.op("Add", y, b.typed(change, dtype), name=f"{name}.lora"), dtype)

    def _kronecker(self, x: str, linear: Linear, scale: tuple[str, str] | None) -> str:
        """The branch of Kronecker products, of rows [rows, in_width]: two small products for all of them."""
        b, name, dtype = self.b, f"{linear.name}.lokr", self.b.type_of(x)
        full, last = b.full_name(linear.name), b.integers(-1)
        outer = b.branch_input(outer_input(full), (f"{full}.a", f"{full}.b", f"{full}.products"))
        inner = b.branch_input(inner_input(full), (f"{full}.d", f"{full}.products", f"{full}.c"))
        columns = b.branch_input(columns_input(full), (f"{full}.columns",))
        rows = b.branch_input(rows_input(full), (f"{full}.rows",))
        a, d = b.dim(outer, 0, f"{name}.a"), b.dim(inner, 0, f"{name}.d")
        # of one channel where there is no product
        x = b.op("Slice", x, b.integers(0), b.dim(columns, 0, f"{name}.in_width"), b.integers(1), name=f"{name}.in")
        x = b.typed(b.op("Mul", b.typed(x, dtype), b.cast(columns, dtype), name=f"{name}.columns"), dtype)
        if scale is not None:
            x = b.op(scale[0], x, scale[1], name=f"{name}.scaled")
        x = b.op("Reshape", x, b.op("Concat", last, d, name=f"{name}.in.shape", axis=0), name=f"{name}.split")
        inner = b.op(
            "Reshape", inner, b.op("Concat", d, last, name=f"{name}.inner.shape", axis=0), name=f"{name}.right"
        )
        outer = b.op("Reshape", outer, b.op("Concat", a, last, name=f"{name}.outer.shape", axis=0), name=f"{name}.left")
        h = b.op("MatMul", b.typed(x, dtype), b.cast(inner, dtype), name=f"{name}.inner")
        sizes = b.dim(outer, 1, f"{name}.terms"), b.dim(f"{inner_input(full)}", 2, f"{name}.c")
        h = b.op("Reshape", h, b.op("Concat", last, *sizes, name=f"{name}.terms.shape", axis=0), name=f"{name}.each")
        h = b.op("MatMul", b.cast(outer, dtype), b.typed(h, dtype), name=f"{name}.outer")
        out = b.op("Concat", last, b.dim(rows, 0, f"{name}.out_width"), name=f"{name}.out.shape", axis=0)
        h = b.op("Reshape", h, out, name=f"{name}.out")
        return b.typed(b.op("Mul", b.typed(h, dtype), b.cast(rows, dtype), name=f"{name}.rows"), dtype)

    def factor(self, linear: Linear) -> str:
        """The layer's factor per output channel, in float32."""
        full = self.b.full_name(linear.name)
        return self.b.branch_input(factor_input(full), (f"{full}.channels",))

    def factored(self, y: str, linear: Linear) -> str:
        """A layer's output times its factor, which its bias is left out of; as it is in a program without branches."""
        if not self.extended:
            return y
        b, name, dtype = self.b, linear.name, self.b.type_of(y)
        factor = b.cast(self.factor(linear), dtype)
        if not linear.bias:
            return b.typed(b.op("Mul", y, factor, name=f"{name}.dora"), dtype)
        # a factor of one must leave every bit, which (y - bias) + bias does not
        product = b.op("Sub", y, self.weight(f"{name}.bias", (linear.out_width,), dtype), name=f"{name}.unbiased")
        more = b.op("Sub", factor, b.number(1.0, dtype), name=f"{name}.dora.more")
        product = b.op("Mul", b.typed(product, dtype), b.typed(more, dtype), name=f"{name}.dora.change")
        return b.typed(b.op("Add", y, b.typed(product, dtype), name=f"{name}.dora"), dtype)

    def plain_linear(self, x: str, linear: Linear) -> str:
        """A linear layer without what is added to it. One stored in float32 is computed in it."""
        weight = self.b.weight(linear.weight, (linear.out_width, linear.in_width))
        compute = DType.F32 if self.b.type_of(weight) is DType.F32 else self.compute
        inputs = [self.b.cast(x, compute), self.b.cast(weight, compute)]
        if linear.bias:
            inputs.append(self.weight(f"{linear.name}.bias", (linear.out_width,), compute))
        return self.factored(self.b.op("Gemm", *inputs, name=linear.name, transB=1), linear)

    def linears(self, x: str, linears: Sequence[Linear], name: str) -> Iterator[str]:
        """Linear layers that read the same value, one after the other. `name` is for them together."""
        return (self.linear(x, linear) for linear in linears)

    def rows(self, x: str, width: int, name: str = "rows") -> str:
        """[…, width] → [rows, width]; no data moves."""
        return self.b.op("Reshape", x, self.b.integers(-1, width), name=name)

    def reshape(self, x: str, shape: str, name: str) -> str:
        """Any shape to the one in `shape`; no data moves."""
        return self.b.op("Reshape", x, shape, name=name)

    def rms_norm(self, x: str, scale: str, epsilon: float, name: str) -> str:
        """Root mean square norm over the last axis, times `scale` (a value, [width]), in float32."""
        x = self.b.cast(x, DType.F32)
        return self.b.op("RMSNormalization", x, scale, name=name, axis=-1, epsilon=epsilon)

    def branch_norm(self, x: str, scale: str, epsilon: float, exponent: int, name: str) -> str:
        """The norm of a branch's output that was divided by 2**exponent: it ignores scale, except for its epsilon."""
        return self.rms_norm(x, scale, epsilon * 2.0 ** (-2 * exponent), name)

    def table_rows(self, table: str, count: int, width: int, name: str) -> list[str]:
        """The rows of a table of `count` times `width` values as [width] vectors: one `Split`."""
        flat = self.b.op("Reshape", table, self.b.integers(-1), name=f"{name}.flat")
        return self.b.ops("Split", flat, name=f"{name}.rows", outputs=count, axis=0, num_outputs=count)

    def rotary(self, x: str, cos: str, sin: str, heads: int, name: str, *, interleaved: bool) -> str:
        """Rotary embedding of [batch, tokens, heads * head_dim]; tables are [batch, tokens, head_dim / 2].

        `interleaved` rotates neighbouring channels (Z-Image), otherwise a head's two halves (Qwen).
        """
        dtype = self.b.type_of(x)
        tables = [self.b.cast(table, dtype) for table in (cos, sin)]
        return self.b.op("RotaryEmbedding", x, *tables, "", name=name, interleaved=int(interleaved), num_heads=heads)

    def head_norm(self, x: str, norm: Norm) -> str:
        """Normalizes each head of a query or key: [rows, heads * head_dim] → [rows * heads, head_dim].

        The operator itself computes in float32, whatever it reads and writes.
        """
        heads = self.rows(x, norm.width, name=f"{norm.name}.heads")
        scale = self.weight(norm.weight, (norm.width,), self.b.type_of(x))
        return self.b.op("RMSNormalization", heads, scale, name=norm.name, axis=-1, epsilon=norm.epsilon)

    def group_norm(self, x: str, norm: Norm) -> str:
        """Group norm of a map [batch, channels, height, width], in float32."""
        b, name = self.b, norm.name
        shape = b.op("Shape", x, name=f"{name}.shape")
        h = b.op("Reshape", self.normalized_groups(x, norm), shape, name=f"{name}.channels")
        factors = [
            b.op(
                "Reshape",
                b.weight(f"{name}.{kind}", (norm.width,)),
                b.integers(-1, 1, 1),
                name=f"{name}.{kind}.column",
            )
            for kind in ("weight", "bias")
        ]
        h = b.op("Mul", h, factors[0], name=f"{name}.scaled")
        return b.op("Add", h, factors[1], name=name)

    def normalized_groups(self, x: str, norm: Norm) -> str:
        """The values [batch, groups, all of a group] of a map, each group with mean 0 and variance 1, in float32."""
        b, name, groups = self.b, norm.name, norm.groups
        ones = b.constant(np.ones(groups, np.float32), f"ones_{groups}")
        zeros = b.constant(np.zeros(groups, np.float32), f"zeros_{groups}")
        h = b.op("Reshape", b.cast(x, DType.F32), b.integers(0, groups, -1), name=f"{name}.groups")
        return b.op("InstanceNormalization", h, ones, zeros, name=f"{name}.normalized", epsilon=norm.epsilon)

    def doubled(self, x: str, channels: int) -> str:
        """A map [batch, channels, height, width] with each pixel as two by two."""
        scales = self.b.constant(np.array([1, 1, 2, 2], dtype=np.float32), "scales_1_1_2_2")
        return self.b.op(
            "Resize",
            x,
            "",
            scales,
            name="nearest",
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )

    def attention(self, q: str, k: str, v: str, heads: int, head_dim: int, name: str = "scores") -> str:
        """Full attention of [batch, tokens, heads * head_dim]."""
        # the contrib operator is a little faster than opset 23's and blocks over the keys
        return self.b.op("MultiHeadAttention", q, k, v, name=name, contrib=True, num_heads=heads)

    def spatial_attention(self, q: str, k: str, v: str, width: int, name: str = "scores") -> str:
        """Attention of one head over all positions of a map, [batch, positions, width], in blocks of queries."""
        b, blocks = self.b, self.position_blocks
        if blocks == 1:
            return self.attention(q, k, v, heads=1, head_dim=width, name=name)
        batch, count = b.dim(q, 0, f"{name}.batch"), b.dim(q, 1, f"{name}.positions")
        # 1 to `blocks` queries more, so that all blocks have the same length, which is never 0
        length = self.quotient(count, blocks, blocks, f"{name}.block")
        rest = b.op("Sub", b.op("Mul", length, b.integers(blocks), name=f"{name}.padded"), count, name=f"{name}.rest")
        one = b.op("Slice", q, b.integers(0), b.integers(1), b.integers(1), name=f"{name}.first")
        shape = b.op("Concat", batch, rest, b.integers(width), name=f"{name}.more.shape", axis=0)
        q = b.op("Concat", q, b.op("Expand", one, shape, name=f"{name}.more"), name=f"{name}.queries", axis=1)
        parts = [self.attention(x, k, v, 1, width, name) for x in self.blocks(q, 1, length, blocks, name)]
        return b.op("Slice", self.joined(parts, 1, name), b.integers(0), count, b.integers(1), name=f"{name}.all")

    def quotient(self, size: str, more: int, divisor: int, name: str) -> str:
        """(size + more) / divisor, rounded down, of the size of an axis."""
        more_of = self.b.op("Add", size, self.b.integers(more), name=f"{name}.dividend")
        return self.b.op("Div", more_of, self.b.integers(divisor), name=name)

    def blocks(self, x: str, axis: int, length: str, count: int, name: str) -> list[str]:
        """A value in blocks of one length along an axis, of which the last may be shorter."""
        b = self.b
        bounds = [b.op("Mul", length, b.integers(i), name=f"{name}.bound{i}") for i in range(count + 1)]
        return [
            b.op("Slice", x, start, end, b.integers(axis), name=f"{name}.block{i}")
            for i, (start, end) in enumerate(itertools.pairwise(bounds))
        ]

    def joined(self, parts: Sequence[str], axis: int, name: str) -> str:
        """The parts one after the other along an axis, a few at a time."""
        while len(parts) > 1:
            parts = [
                self.b.op("Concat", *some, name=f"{name}.joined", axis=axis) if len(some) > 1 else some[0]
                for some in (parts[start : start + _JOINED] for start in range(0, len(parts), _JOINED))
            ]
        return parts[0]

    def causal_attention(
        self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int, name: str = "scores"
    ) -> str:
        """Causal attention in which `heads` queries share `kv_heads` keys and values; for short sequences."""
        return self.b.op("Attention", q, k, v, name=name, q_num_heads=heads, kv_num_heads=kv_heads, is_causal=1)

    def silu(self, x: str, name: str) -> str:
        """x * sigmoid(x); ONNX Runtime fuses the two."""
        return self.b.op("Mul", x, self.b.op("Sigmoid", x, name=f"{name}.sigmoid"), name=name)

    def scaled(self, x: str, exponent: int, name: str) -> str:
        """x * 2**exponent in x's own type; nothing where the exponent is 0."""
        if exponent == 0:
            return x
        return self.b.op("Mul", x, self.b.cast(self.b.number(2.0**exponent), self.b.type_of(x)), name=name)

    def gated(self, x: str, gate: Linear, up: Linear, down: Linear, exponent: int = 0) -> str:
        """SwiGLU on rows: down(silu(gate(x)) * up(x) * 2**exponent)."""
        values = self.linears(x, (gate, up), "gate_up")
        gate_out = self.scaled(self.silu(next(values), f"{gate.name}.silu"), exponent, "range")
        product = self.b.op("Mul", gate_out, next(values), name="product")
        return self.linear(product, down)

    def hint(self, x: str, name: str) -> str:
        """Adds a ControlNet's hint, an input of [batch, tokens, dim] or of [1, 1, dim], to the residual stream."""
        shape = (f"{name}.batch", f"{name}.tokens", self.b.dims["dim"])
        return self.residual(x, self.b.extra_input(name, shape, self.hints), f"{name}.added")

    def residual(self, x: str, update: str, name: str) -> str:
        """Adds a branch to the residual stream, which is float32."""
        return self.b.op("Add", x, self.b.cast(update, DType.F32), name=name)
