"""The layers of WebGPU's programs: products in float32, and attention that stores a few heads' scores at a time.

ONNX Runtime's WebGPU provider sums fp16 products in fp16, which costs half a percent of each linear's output and can
overflow. So weights keep their 16, 8 or 4 bits in the device's memory, and every product is in float32. The provider
has no bfloat16 at all: bundles in it get no such programs, and where the autoencoder's weights are bfloat16 (in an fp16
bundle), ONNX Runtime must fold their casts when it loads a program. Its fused attention, which stores no scores, is
silently wrong on Vulkan: it is a program of its own (`WEBGPU_FUSED`), for adapters on which it proves right. The others
multiply, take a softmax and multiply, in blocks of the sizes that `zimage_runtime.model.query_blocks` states.

Only shapes are computed on the CPU, and no value is copied between the two. So these are not used: `Attention`, `Range`
and `If`, which run on the CPU; `Split` with many outputs, which binds more buffers than a kernel may; empty operands,
which `Softmax` refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zimage_runtime.bundle.manifest import WEBGPU, WEBGPU_FUSED, Precision, extended
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.programs import Program
from zimage_runtime.model.query_blocks import HEADS_PER_GROUP, POSITION_BLOCKS, TOKEN_BLOCKS

from ..storage.precision import StoragePolicy
from .builder import GraphBuilder
from .int4 import BlockLayers
from .int8 import WidenedInt8Layers
from .layers import Layers
from .program_set import EXTENDED_ON_DEVICE, ProgramSet, TypePolicy

_LONG = (Program.DENOISER, Program.REFINERS, Program.CONTROL_REFINER, Program.CONTROL_LAYERS)
"""The programs whose attention is over an image's tokens."""

_UNSEEN = -1e30  # a score whose exponential is 0 beside any other's


@dataclass(frozen=True)
class WebGpuLayers(Layers):
    """Layers for WebGPU, in float32."""

    position_blocks: int = POSITION_BLOCKS
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
        """Full attention of [batch, tokens, heads * head_dim]. Captions are short: their heads are one group; blocks of
        the autoencoder's positions are made before."""
        if self.fused:
            return super().attention(q, k, v, heads, head_dim, name)
        b = self.b
        q = self._heads(self._scaled(q, head_dim, name), heads, [0, 2, 1, 3])
        k, v = self._heads(k, heads, [0, 2, 3, 1]), self._heads(v, heads, [0, 2, 1, 3])
        h = self._grouped(q, k, v, heads, name) if b.program in _LONG else self._attended(q, k, v, name)
        h = b.op("Transpose", h, name=f"{name}.tokens", perm=[0, 2, 1, 3])
        return b.op("Reshape", h, b.integers(0, 0, heads * head_dim), name=name)

    def _grouped(self, q: str, k: str, v: str, heads: int, name: str) -> str:
        """As `_attended`, a few heads and a block of the queries at a time."""
        b, groups = self.b, []
        length = self.quotient(b.dim(q, 2, f"{name}.length"), TOKEN_BLOCKS - 1, TOKEN_BLOCKS, f"{name}.block")
        blocks = self.blocks(q, 2, length, TOKEN_BLOCKS, name)
        for first in range(0, heads, HEADS_PER_GROUP):
            bounds = b.integers(first), b.integers(min(first + HEADS_PER_GROUP, heads)), b.integers(1)
            keys, values, *queries = (
                b.op("Slice", x, *bounds, name=f"{name}.{first}.{part}")
                for part, x in zip(("keys", "values", *range(len(blocks))), (k, v, *blocks), strict=True)
            )
            parts = [self._attended(x, keys, values, f"{name}.{first}") for x in queries]
            groups.append(self.joined(parts, 2, f"{name}.{first}"))
        return self.joined(groups, 1, name)

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
        return self.b.op("Mul", q, self.b.number(head_dim**-0.5), name=f"{name}.scaled")

    def _heads(self, x: str, heads: int, axes: Sequence[int]) -> str:
        """[batch, tokens, heads * head_dim] as [batch, tokens, heads, head_dim], with the axes in another order.

        Once, if several blocks of queries see the same keys.
        """
        b, name = self.b, f"{x}.heads"
        if not b.has(name):
            with b.outside():
                split = b.op("Reshape", x, b.integers(0, 0, heads, -1), name=f"{x}.split")
                b.op("Transpose", split, name=name, perm=axes)
        return name

    def _attended(self, q: str, k: str, v: str, name: str) -> str:
        """Softmax of [..., queries, head_dim] times [..., head_dim, keys], times [..., keys, head_dim]."""
        scores = self.b.op("MatMul", q, k, name=f"{name}.products")
        weights = self.b.op("Softmax", scores, name=f"{name}.weights", axis=-1)
        return self.b.op("MatMul", weights, v, name=f"{name}.mixed")

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

    position_blocks: int = POSITION_BLOCKS  # again: a dataclass takes the defaults of its first base


@dataclass(frozen=True)
class BlockWebGpuLayers(BlockLayers, WebGpuLayers):
    """Layers whose weights are 4-bit blocks, which are multiplied as they are, in float32."""

    position_blocks: int = POSITION_BLOCKS
    accuracy_level: int = 0  # exact; others quantize the activations


def _layers(b: GraphBuilder, policy: TypePolicy, *, fused: bool = False, extended: bool = False) -> Layers:
    match policy:
        case StoragePolicy(precision=Precision.INT8):
            return Int8WebGpuLayers(b, policy=policy, fused=fused, extended=extended)
        case StoragePolicy(precision=Precision.INT4):
            return BlockWebGpuLayers(b, policy=policy, fused=fused, extended=extended)
    return WebGpuLayers(b, fused=fused, extended=extended)


def _fused_layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return _layers(b, policy, fused=True)


def _extended_layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return _layers(b, policy, extended=True)


def _extended_fused_layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return _layers(b, policy, fused=True, extended=True)


_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4)
_WIDENED = frozenset({DType.BF16})

WEBGPU_PROGRAMS = ProgramSet(WEBGPU, _layers, precisions=_PRECISIONS, widened=_WIDENED)
FUSED_PROGRAMS = ProgramSet(
    WEBGPU_FUSED, _fused_layers, (Program.DENOISER,), _PRECISIONS, _WIDENED, variant_of=WEBGPU, standard=False
)
WEBGPU_EXTENDED = ProgramSet(
    extended(WEBGPU), _extended_layers, EXTENDED_ON_DEVICE, _PRECISIONS, _WIDENED, variant_of=WEBGPU, extended=True
)
FUSED_EXTENDED = ProgramSet(
    extended(WEBGPU_FUSED),
    _extended_fused_layers,
    (Program.DENOISER, Program.REFINERS),
    _PRECISIONS,
    _WIDENED,
    variant_of=WEBGPU,
    extended=True,
    standard=False,
)
