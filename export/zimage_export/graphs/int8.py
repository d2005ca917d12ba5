"""Linear layers of int8 weights and 8-bit activations (W8A8).

Weights have one scale per output channel, activations one per token, so that neither a channel nor a token of large
values (pads, in this model) costs the others their resolution. Activations are quantized once for all layers that read
them. Quantization is symmetric. The CPU has fast kernels for uint8 times int8 only, so zero is stored as levels + 1
there; CUDA has them for int8 times int8, with zero at 0.

The CPU's product is converted to float32 and multiplied by the output channels' scales tile by tile as it is computed
(`MatMulIntegerToFloat`). Of the three passes over a layer's output that scaling would take, one is left, and none
where the output is a factor of a product that is quantized again.
"""

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.machine.int8_products import ACTIVATION_LEVELS, SAFE_LEVELS
from zimage_runtime.model.linears import Linear

from ..storage.precision import Encoding, StoragePolicy, scale_of
from .builder import GraphBuilder
from .layers import Layers
from .rotation import rotate

_TINY = 1e-30  # the least scale, for tokens of zeros


@dataclass(frozen=True)
class Quantized:
    """Rows of activations as integers."""

    values: str  # [rows, width] uint8 around `zero`, or int8
    scale: str  # [rows, 1] float32
    zero: str  # a uint8 scalar; empty for int8


def is_int8(b: GraphBuilder, policy: StoragePolicy, linear: Linear) -> bool:
    """Whether a linear layer of the builder's scope is stored as integers."""
    return policy.encoding(b.program.component, b.full_name(linear.weight)) is Encoding.INT8


def rotation(b: GraphBuilder, policy: StoragePolicy, linear: Linear) -> int:
    """How many inputs of a linear layer of the builder's scope are rotated together; 0 for none."""
    return policy.rotation(b.program.component, b.full_name(linear.weight))


def int8_weight(layers: Layers, linear: Linear) -> tuple[str, str]:
    """A linear layer's weight [in_width, out_width] int8, and its scales [out_width] float32.

    In an extended program, the layer's factor per output channel is part of the scales, where it takes no time.
    """
    b = layers.b
    weight = b.weight(linear.weight, (linear.in_width, linear.out_width), DType.I8)
    scale = b.weight(scale_of(linear.weight), (linear.out_width,), DType.F32)
    if layers.extended:
        scale = b.typed(b.op("Mul", scale, layers.factor(linear), name=f"{linear.name}.dora"), DType.F32)
    return weight, scale


@dataclass(frozen=True)
class Int8Layers(Layers):
    """Layers for the CPU whose quantized linears multiply integers."""

    policy: StoragePolicy = field(default_factory=lambda: StoragePolicy(Precision.INT8))
    whole_rotations: bool = False  # as one product, see `rotation`
    _known: dict[str, Quantized] = field(default_factory=dict)  # by the value that was quantized

    def plain_linear(self, x: str, linear: Linear) -> str:
        """A linear layer on rows [rows, in_width] → [rows, out_width] float32."""
        if not is_int8(self.b, self.policy, linear):
            return super().plain_linear(x, linear)
        quantized = self._quantized(x, linear)
        product = self._product(quantized, linear)
        return self.b.op("Mul", product, quantized.scale, name=linear.name)

    def gated(self, x: str, gate: Linear, up: Linear, down: Linear, exponent: int = 0) -> str:
        """SwiGLU on rows. The rows' scales of `up` are applied together with those of the quantized product."""
        if not all(is_int8(self.b, self.policy, linear) for linear in (gate, up, down)):
            return super().gated(x, gate, up, down, exponent)
        gate_out = self.scaled(self.silu(self.linear(x, gate), f"{gate.name}.silu"), exponent, "range")
        source = self._quantized(x, up)
        unscaled = self._product(source, up)
        if self.extended:
            unscaled = self.branch(x, unscaled, up, scale=("Div", source.scale))
        factors = self.b.op("Mul", gate_out, unscaled, name="product")
        product = self._quantized(factors, down)
        scale = self.b.op("Mul", product.scale, source.scale, name="product.row_scale")
        y = self.b.op("Mul", self._product(product, down), scale, name=down.name)
        return self.branch(factors, y, down, scale=("Mul", source.scale)) if self.extended else y

    def _quantized(self, x: str, reader: Linear) -> Quantized:
        """Rows of activations as the integers that a linear reads, which linears of the same rotation share."""
        size = rotation(self.b, self.policy, reader)
        key = f"{x} in groups of {size}" if size else x
        if key not in self._known:
            values = self.b.cast(x, DType.F32)
            if size:
                values = rotate(self.b, values, size, reader.in_width, whole=self.whole_rotations)
            self._known[key] = self._quantize(values)
        return self._known[key]

    def _quantize(self, x: str) -> Quantized:
        b = self.b
        levels = b.setting(ACTIVATION_LEVELS, SAFE_LEVELS)
        if "activation_zero" not in self._known:
            with b.outside():
                zero = b.op("Add", levels, b.number(1.0), name="activation_zero.float")
                zero = b.op("Cast", zero, name="activation_zero", to=TensorProto.UINT8)
            self._known["activation_zero"] = Quantized("", "", zero)
        return self._rows(x, levels, self._known["activation_zero"].zero)

    def _rows(self, x: str, levels: str, zero: str) -> Quantized:
        """Quantizes each row by the largest of its magnitudes: two passes that read, and one that writes bytes."""
        b, last = self.b, self.b.integers(-1)
        most = b.op("ReduceMax", x, last, name="quantized.most", keepdims=1)
        least = b.op("Neg", b.op("ReduceMin", x, last, name="quantized.least", keepdims=1), name="quantized.negated")
        tiny = b.constant(np.array([[_TINY]], np.float32), "tiny")
        peak = b.op("Max", most, least, tiny, name="quantized.peak")
        scale = b.op("Div", peak, levels, name="quantized.scale")
        flat = b.op("Reshape", scale, last, name="quantized.scales")
        zeros = b.op("Expand", zero, b.op("Shape", flat, name="quantized.rows"), name="quantized.zeros")
        return Quantized(b.op("QuantizeLinear", x, flat, zeros, name="quantized", axis=0), scale, zero)

    def _product(self, x: Quantized, linear: Linear) -> str:
        """The product in float32, without the rows' scale."""
        b = self.b
        weight, scale = int8_weight(self, linear)
        inputs = [x.values, weight, b.number(1.0), scale, x.zero]
        return b.typed(b.op("MatMulIntegerToFloat", *inputs, name=f"{linear.name}.product", contrib=True), DType.F32)


@dataclass(frozen=True)
class WidenedInt8Layers(Layers):
    """Layers whose int8 weights are each widened to the compute type just before their product.

    ONNX Runtime folds no constants through a `DequantizeLinear`, as it would through a `Cast`: the weights stay int8
    in memory.
    """

    policy: StoragePolicy = field(default_factory=lambda: StoragePolicy(Precision.INT8))

    def plain_linear(self, x: str, linear: Linear) -> str:
        """A linear layer on rows [rows, in_width] → [rows, out_width] in the compute type."""
        if not is_int8(self.b, self.policy, linear):
            return super().plain_linear(x, linear)
        b = self.b
        if size := rotation(b, self.policy, linear):
            x = rotate(b, b.cast(x, DType.F32), size, linear.in_width, whole=True)
        with b.widening():
            weight, scale = int8_weight(self, linear)
            scale = b.cast(scale, self.compute)
            widened = b.op("DequantizeLinear", weight, scale, name=f"{linear.name}.widened", axis=1)
        widened = b.typed(widened, self.compute)
        return b.typed(b.op("MatMul", b.cast(x, self.compute), widened, name=linear.name), self.compute)
