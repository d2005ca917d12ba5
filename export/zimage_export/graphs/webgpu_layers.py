"""The layers of WebGPU's programs: products in float32, and attention that stores a few heads' scores at a time.

ONNX Runtime's WebGPU provider sums fp16 products in fp16, which costs half a percent of each linear's output and
overflows; so weights keep their 16, 8 or 4 bits in the device's memory, and every product is in float32. It has no
bfloat16 at all: bundles in it get no such programs, and the autoencoder's weights, where they are bfloat16, are widened
when a program is loaded. Its fused attention, which stores no scores, is silently wrong on Vulkan, so that it is a
program of its own (`WEBGPU_FUSED`) for adapters on which it proves right; the others multiply, take a softmax and
multiply, in blocks of the sizes that `zimage_runtime.model.query_blocks` states.

Nothing but shapes is computed on the CPU, and no value crosses between the two. What the provider lacks, or does not
do well, is not used: `Split` with many outputs (a kernel binds 8 buffers or more, by adapter), `Concat` of many
inputs (several passes, which are right for one image only), `Attention`, `If` (on the CPU, with copies), an empty
operand (`Softmax` refuses it).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zimage_runtime.bundle.manifest import WEBGPU, WEBGPU_FUSED, Precision
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.programs import Program
from zimage_runtime.model.query_blocks import HEADS_PER_GROUP, POSITION_BLOCKS, TOKEN_BLOCKS

from ..storage.precision import StoragePolicy
from .builder import GraphBuilder
from .int4 import BlockLayers
from .int8 import WidenedInt8Layers
from .layers import Layers
from .program_set import ProgramSet, TypePolicy

_BUFFERS = 7  # that one kernel may read: every adapter binds 8, and one is written
_UNSEEN = -1e30  # a score whose exponential is 0 beside any other's


@dataclass(frozen=True)
class WebGpuLayers(Layers):
    """Layers for WebGPU, in float32."""

    fused: bool = False  # long attention is one operator, which stores no scores

    def table_rows(self, table: str, count: int, width: int, name: str) -> list[str]:
        """A table's rows as [width] vectors, a `Gather` for each."""
        b = self.b
        flat = b.op("Reshape", table, b.integers(count, width), name=f"{name}.flat")
        return [
            b.op("Gather", flat, b.constant(np.array(row, np.int64), f"int64_scalar_{row}"), name=f"{name}.{row}")
            for row in range(count)
        ]

    def attention(self, q: str, k: str, v: str, heads: int, head_dim: int, name: str = "scores") -> str:
        """Full attention of [batch, tokens, heads * head_dim]. Captions are short: their heads are one group."""
        if self.fused:
            return super().attention(q, k, v, heads, head_dim, name)
        b, long = self.b, self.b.program is Program.DENOISER
        q = self._heads(self._scaled(q, head_dim, name), heads, f"{name}.q", [0, 2, 1, 3])
        k = self._heads(k, heads, f"{name}.k", [0, 2, 3, 1])
        v = self._heads(v, heads, f"{name}.v", [0, 2, 1, 3])
        if not long:
            h = self._attended(q, k, v, name)
        else:
            blocks = self._blocks(q, 2, TOKEN_BLOCKS, name)
            groups = []
            for first in range(0, heads, HEADS_PER_GROUP):
                bounds = b.integers(first), b.integers(min(first + HEADS_PER_GROUP, heads)), b.integers(1)
                keys, values = (b.op("Slice", x, *bounds, name=f"{x}.{first}") for x in (k, v))
                parts = [
                    self._attended(b.op("Slice", x, *bounds, name=f"{x}.{first}"), keys, values, f"{name}.{first}")
                    for x in blocks
                ]
                groups.append(self._joined(parts, 2, f"{name}.{first}.blocks"))
            h = self._joined(groups, 1, f"{name}.groups")
        h = b.op("Transpose", h, name=f"{name}.tokens", perm=[0, 2, 1, 3])
        return b.op("Reshape", h, b.integers(0, 0, heads * head_dim), name=name)

    def spatial_attention(self, q: str, k: str, v: str, width: int, name: str = "scores") -> str:
        """Attention of one head over all positions, [batch, positions, width], in blocks of queries."""
        b = self.b
        count = b.dim(q, 1, f"{name}.positions")
        # so that no block is empty, however small the image
        rest = b.op("Mod", b.op("Neg", count, name=f"{name}.less"), b.integers(POSITION_BLOCKS), name=f"{name}.rest")
        pads = b.op("Concat", b.integers(0, 0, 0, 0), rest, b.integers(0), name=f"{name}.pads", axis=0)
        q = b.op("Pad", self._scaled(q, width, name), pads, name=f"{name}.q.padded")
        k = b.op("Transpose", k, name=f"{name}.k.columns", perm=[0, 2, 1])
        parts = [self._attended(x, k, v, name) for x in self._blocks(q, 1, POSITION_BLOCKS, name)]
        h = self._joined(parts, 1, f"{name}.blocks")
        return b.op("Slice", h, b.integers(0), count, b.integers(1), name=name)

    def causal_attention(
        self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int, name: str = "scores"
    ) -> str:
        """Causal attention in which `heads` queries share `kv_heads` keys and values; for short sequences.

        The queries that share a key are rows of one product: [kv_heads, heads / kv_heads * tokens, head_dim].
        """
        b, shared, mask = self.b, heads // kv_heads, self._mask(q)
        each = b.integers(-1, kv_heads, shared, head_dim)
        q = b.op("Reshape", self._scaled(q, head_dim, name), each, name=f"{name}.q")
        q = b.op("Transpose", q, name=f"{name}.q.heads", perm=[1, 2, 0, 3])
        q = b.op("Reshape", q, b.integers(kv_heads, -1, head_dim), name=f"{name}.q.rows")
        columns = b.integers(-1, kv_heads, head_dim)
        k = b.op("Reshape", k, columns, name=f"{name}.k")
        k = b.op("Transpose", k, name=f"{name}.k.heads", perm=[1, 2, 0])
        v = b.op("Transpose", b.op("Reshape", v, columns, name=f"{name}.v"), name=f"{name}.v.heads", perm=[1, 0, 2])
        tokens = b.dim(mask, 0, f"{name}.tokens")
        scores = b.op("MatMul", q, k, name=f"{name}.products")
        each = b.op("Concat", b.integers(kv_heads, shared, -1), tokens, name=f"{name}.shape", axis=0)
        scores = b.op("Add", b.op("Reshape", scores, each, name=f"{name}.each"), mask, name=f"{name}.masked")
        weights = b.op("Softmax", scores, name=f"{name}.weights", axis=-1)
        rows = b.op("Concat", b.integers(kv_heads, -1), tokens, name=f"{name}.rows.shape", axis=0)
        h = b.op("MatMul", b.op("Reshape", weights, rows, name=f"{name}.rows"), v, name=f"{name}.mixed")
        h = b.op("Reshape", h, b.integers(kv_heads, shared, -1, head_dim), name=f"{name}.mixed.each")
        h = b.op("Transpose", h, name=f"{name}.mixed.tokens", perm=[2, 0, 1, 3])
        return b.op("Reshape", h, b.integers(1, -1, heads * head_dim), name=name)

    def _scaled(self, q: str, head_dim: int, name: str) -> str:
        return self.b.op("Mul", q, self.b.number(head_dim**-0.5), name=f"{name}.q.scaled")

    def _heads(self, x: str, heads: int, name: str, axes: Sequence[int]) -> str:
        """[batch, tokens, heads * head_dim] as [batch, tokens, heads, head_dim], with the axes in another order."""
        x = self.b.op("Reshape", x, self.b.integers(0, 0, heads, -1), name=name)
        return self.b.op("Transpose", x, name=f"{name}.heads", perm=axes)

    def _attended(self, q: str, k: str, v: str, name: str) -> str:
        """Softmax of [..., queries, head_dim] times [..., head_dim, keys], times [..., keys, head_dim]."""
        scores = self.b.op("MatMul", q, k, name=f"{name}.products")
        weights = self.b.op("Softmax", scores, name=f"{name}.weights", axis=-1)
        return self.b.op("MatMul", weights, v, name=f"{name}.mixed")

    def _blocks(self, x: str, axis: int, count: int, name: str) -> list[str]:
        """A value in blocks along an axis, all of one length but perhaps the last."""
        b = self.b
        length = b.op("Add", b.dim(x, axis, f"{name}.length"), b.integers(count - 1), name=f"{name}.more")
        length = b.op("Div", length, b.integers(count), name=f"{name}.block")
        bounds = [b.op("Mul", length, b.integers(i), name=f"{name}.bound{i}") for i in range(count + 1)]
        return [
            b.op("Slice", x, start, end, b.integers(axis), name=f"{x}.block{i}")
            for i, (start, end) in enumerate(itertools.pairwise(bounds))
        ]

    def _joined(self, parts: Sequence[str], axis: int, name: str) -> str:
        """The parts one after the other along an axis, a few at a time."""
        while len(parts) > 1:
            parts = [
                self.b.op("Concat", *some, name=name, axis=axis) if len(some) > 1 else some[0]
                for some in (parts[start : start + _BUFFERS] for start in range(0, len(parts), _BUFFERS))
            ]
        return parts[0]

    def _mask(self, x: str) -> str:
        """What is added to the scores of each token of [1, tokens, width]: [tokens, tokens], once for a program."""
        b = self.b
        if not b.has("causal_mask"):
            with b.outside():
                ones = b.op("Expand", b.constant(np.ones(1, np.float32), "one"), b.dim(x, 1, "tokens"), name="ones")
                zero = b.constant(np.array(0, np.int64), "int64_scalar_0")
                columns = b.op("CumSum", ones, zero, name="positions")  # `Range` would run on the CPU
                rows = b.op("Unsqueeze", columns, b.integers(1), name="positions.rows")
                seen = b.op("LessOrEqual", columns, rows, name="seen")
                b.op("Where", seen, b.number(0.0), b.number(_UNSEEN), name="causal_mask")
        return "causal_mask"


@dataclass(frozen=True)
class Int8WebGpuLayers(WidenedInt8Layers, WebGpuLayers):
    """Layers whose int8 weights are each widened just before their product."""


@dataclass(frozen=True)
class BlockWebGpuLayers(BlockLayers, WebGpuLayers):
    """Layers whose weights are 4-bit blocks, which are multiplied as they are, in float32."""

    accuracy_level: int = 0  # exact; others quantize the activations


def _layers(b: GraphBuilder, policy: TypePolicy, *, fused: bool = False) -> Layers:
    match policy:
        case StoragePolicy(precision=Precision.INT8):
            return Int8WebGpuLayers(b, policy=policy, fused=fused)
        case StoragePolicy(precision=Precision.INT4):
            return BlockWebGpuLayers(b, policy=policy, fused=fused)
    return WebGpuLayers(b, fused=fused)


def _fused_layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return _layers(b, policy, fused=True)


_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4)
_WIDENED = frozenset({DType.BF16})

WEBGPU_PROGRAMS = ProgramSet(WEBGPU, _layers, precisions=_PRECISIONS, widened=_WIDENED)
FUSED_PROGRAMS = ProgramSet(
    WEBGPU_FUSED, _fused_layers, (Program.DENOISER,), _PRECISIONS, _WIDENED, variant_of=WEBGPU, standard=False
)
