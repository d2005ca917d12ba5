"""The layers of CUDA's programs: attention that dispatches to flash attention, products in 16 bits or of int8.

An int8 bundle's denoiser comes in three forms on the same bytes: W8A8, fp16 products for which each weight is widened
just before, and `MatMulNBits` of 8 bits, whose kernel widens by itself. GPUs differ in which is faster. The text
encoder and the caption have few tokens, for which widening all weights would take longer than using them.
"""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from zimage_runtime.bundle.manifest import CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY, Precision, extended
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.machine.int8_products import EXACT_LEVELS
from zimage_runtime.model.linears import Linear
from zimage_runtime.model.norms import Norm
from zimage_runtime.model.programs import Program
from zimage_runtime.model.query_blocks import POSITION_BLOCKS

from ..storage.precision import StoragePolicy, scale_of
from .builder import GraphBuilder
from .int4 import BlockLayers
from .int8 import Int8Layers, Quantized, WidenedInt8Layers, int8_weight, is_int8, rotation
from .layers import Layers
from .program_set import EXTENDED_ON_DEVICE, ProgramSet, TypePolicy
from .rotation import rotate

_BLOCKS = (128, 64, 32)
"""Inputs of a block, the first that divides the layer's: all blocks of a channel have its scale."""


@dataclass(frozen=True)
class CudaLayers(Layers):
    """Layers for CUDA: operators of opset 23 alone.

    `Attention` of one head as wide as the autoencoder's is not flash attention, and stores its scores.
    """

    position_blocks: int = POSITION_BLOCKS
    hints: DType = DType.BF16  # whose range is float32's: hints are as large as the residual stream may get

    def attention(self, q: str, k: str, v: str, heads: int, head_dim: int, name: str = "scores") -> str:
        """Full attention of [batch, tokens, heads * head_dim]."""
        return self.b.op("Attention", q, k, v, name=name, q_num_heads=heads, kv_num_heads=heads)

    def normalized_groups(self, x: str, norm: Norm) -> str:
        """The values of a map by groups, each normalized.

        `InstanceNormalization` of opset 22 and later has no kernel on CUDA: it ran on the host, with a copy of the map
        each way, which took four fifths of an image's time on an H100.
        """
        b, name = self.b, norm.name
        h = b.op("Reshape", b.cast(x, DType.F32), b.integers(0, norm.groups, -1), name=f"{name}.groups")
        ones = b.op("Expand", b.number(1.0), b.op("Shape", h, name=f"{name}.length", start=2), name=f"{name}.ones")
        ones = b.typed(ones, DType.F32)
        return b.op("LayerNormalization", h, ones, name=f"{name}.normalized", axis=-1, epsilon=norm.epsilon)

    def doubled(self, x: str, channels: int) -> str:
        """A map with each pixel as two by two. CUDA has no `Resize` in bfloat16, and nothing else would run it."""
        b = self.b
        rows = b.op("Mul", b.dim(x, 2, "rows"), b.integers(2), name="rows.doubled")
        shape = b.op("Concat", b.integers(0, channels), rows, b.integers(-1), name="nearest.shape", axis=0)
        x = b.op("Unsqueeze", x, b.integers(3, 5), name="pixels")
        x = b.op("Expand", x, b.integers(1, 1, 1, 2, 1, 2), name="repeated")
        return b.op("Reshape", x, shape, name="nearest")


@dataclass(frozen=True)
class Int8CudaLayers(Int8Layers, CudaLayers):
    """W8A8 for CUDA: int8 activations, and standard operators alone."""

    position_blocks: int = POSITION_BLOCKS  # again: a dataclass takes the defaults of its first base
    hints: DType = DType.BF16
    whole_rotations: bool = True

    def attention(self, q: str, k: str, v: str, heads: int, head_dim: int, name: str = "scores") -> str:
        """Full attention in fp16, which keeps more than the bytes around it do; flash attention knows no float32."""
        q, k, v = (self.b.cast(value, DType.F16) for value in (q, k, v))
        return super().attention(q, k, v, heads, head_dim, name)

    def _quantize(self, x: str) -> Quantized:
        zero = self.b.constant(np.array(0, np.int8), "int8_zero")
        rows = self._rows(x, self.b.number(EXACT_LEVELS), zero)
        return Quantized(rows.values, rows.scale, "")

    def _product(self, x: Quantized, linear: Linear) -> str:
        b = self.b
        weight, scale = int8_weight(self, linear)
        product = b.op("MatMulInteger", x.values, weight, name=f"{linear.name}.integers")
        product = b.op("Cast", product, name=f"{linear.name}.float", to=TensorProto.FLOAT)
        return b.op("Mul", b.typed(product, DType.F32), scale, name=f"{linear.name}.product")


@dataclass(frozen=True)
class Int8WeightOnlyLayers(WidenedInt8Layers, CudaLayers):
    """Layers for CUDA on the same bytes that multiply in fp16: the folds keep its range."""

    position_blocks: int = POSITION_BLOCKS
    hints: DType = DType.BF16
    compute: DType = DType.F16  # `DequantizeLinear` gives no bfloat16 on CUDA


@dataclass(frozen=True)
class Int8BlocksLayers(Int8WeightOnlyLayers):
    """Layers for CUDA on the same bytes as `MatMulNBits` of 8 bits reads them: [out, in / block, block] around 128.

    Nodes over weights alone bring them there. ONNX Runtime folds these when it loads the program, so that in memory a
    weight takes a byte, as it does on the disk. Widths that no block divides are for weight-only products.
    """

    def plain_linear(self, x: str, linear: Linear) -> str:
        """A linear layer on rows [rows, in_width] → [rows, out_width] fp16."""
        b, name = self.b, linear.name
        block = next((size for size in _BLOCKS if linear.in_width % size == 0), None)
        if block is None or not is_int8(b, self.policy, linear):
            return super().plain_linear(x, linear)
        if size := rotation(b, self.policy, linear):
            x = rotate(b, b.cast(x, DType.F32), size, linear.in_width, whole=True)
        count = linear.in_width // block
        with b.widening():
            weight = b.weight(linear.weight, (linear.in_width, linear.out_width), DType.I8)
            scale = b.weight(scale_of(linear.weight), (linear.out_width,), DType.F32)
            h = b.op("Transpose", weight, name=f"{name}.transposed", perm=[1, 0])
            h = b.op("Cast", h, name=f"{name}.bytes", to=TensorProto.UINT8)
            h = b.op("BitwiseXor", h, b.constant(np.array(128, np.uint8), "uint8_128"), name=f"{name}.around_128")
            h = b.typed(b.op("Reshape", h, b.integers(linear.out_width, count, block), name=f"{name}.blocks"), DType.U8)
            scale = b.op("Reshape", b.cast(scale, self.compute), b.integers(-1, 1), name=f"{name}.scale.column")
            scale = b.op("Expand", scale, b.integers(linear.out_width, count), name=f"{name}.scales")
        y = b.op(
            "MatMulNBits",
            b.cast(x, self.compute),
            h,
            b.typed(scale, self.compute),
            name=name,
            contrib=True,
            K=linear.in_width,
            N=linear.out_width,
            bits=8,
            block_size=block,
        )
        return self.factored(b.typed(y, self.compute), linear)


@dataclass(frozen=True)
class BlockCudaLayers(BlockLayers, CudaLayers):
    """4-bit blocks for CUDA, multiplied in fp16: the folds keep its range."""

    position_blocks: int = POSITION_BLOCKS
    hints: DType = DType.BF16
    activations: DType = DType.F16
    accuracy_level: int = 0  # whatever the kernel does


def _layers(b: GraphBuilder, policy: TypePolicy, *, extended: bool = False) -> Layers:
    match policy:
        case StoragePolicy(precision=Precision.INT8):
            return Int8CudaLayers(b, policy=policy, extended=extended)
        case StoragePolicy(precision=Precision.INT4):
            return BlockCudaLayers(b, policy=policy, extended=extended)
    return CudaLayers(b, policy.gpu_compute(b.program.component), extended=extended)


def _weight_only_layers(b: GraphBuilder, policy: TypePolicy, *, extended: bool = False) -> Layers:
    assert isinstance(policy, StoragePolicy)
    return Int8WeightOnlyLayers(b, policy=policy, extended=extended)


def _blocks_layers(b: GraphBuilder, policy: TypePolicy, *, extended: bool = False) -> Layers:
    assert isinstance(policy, StoragePolicy)
    return Int8BlocksLayers(b, policy=policy, extended=extended)


def _extended_blocks(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return _blocks_layers(b, policy, extended=True)


def _extended_layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return _layers(b, policy, extended=True)


def _extended_weight_only(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return _weight_only_layers(b, policy, extended=True)


CUDA_PROGRAMS = ProgramSet(CUDA, _layers)
WEIGHT_ONLY_PROGRAMS = ProgramSet(
    CUDA_WEIGHT_ONLY, _weight_only_layers, (Program.DENOISER,), (Precision.INT8,), variant_of=CUDA
)
BLOCKS_PROGRAMS = ProgramSet(CUDA_BLOCKS, _blocks_layers, (Program.DENOISER,), (Precision.INT8,), variant_of=CUDA)
CUDA_EXTENDED = ProgramSet(extended(CUDA), _extended_layers, EXTENDED_ON_DEVICE, variant_of=CUDA, extended=True)
WEIGHT_ONLY_EXTENDED = ProgramSet(
    extended(CUDA_WEIGHT_ONLY),
    _extended_weight_only,
    (Program.DENOISER, Program.REFINERS),
    (Precision.INT8,),
    variant_of=CUDA,
    extended=True,
)
BLOCKS_EXTENDED = ProgramSet(
    extended(CUDA_BLOCKS),
    _extended_blocks,
    (Program.DENOISER, Program.REFINERS),
    (Precision.INT8,),
    variant_of=CUDA,
    extended=True,
)
