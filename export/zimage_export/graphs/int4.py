"""Linear layers whose weights are 4 bits in blocks of 32 (or 8, where 4 lose too much), for small memories.

`MatMulNBits` reads them as they are stored. On the CPU it quantizes activations to int8 in the same blocks
(accuracy level 4), which is several times faster than widening the weights; on CUDA it widens them to fp16.
"""

from dataclasses import dataclass, field

from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.linears import Linear

from ..storage.precision import BLOCK_SIZE, Encoding, StoragePolicy, scale_of
from .layers import Layers

_BITS = {Encoding.BLOCKS4: 4, Encoding.BLOCKS8: 8}
_INTEGER_ACTIVATIONS = 4  # of ONNX Runtime's accuracy levels


@dataclass(frozen=True)
class BlockLayers(Layers):
    """Layers for the CPU whose quantized linears are `MatMulNBits`."""

    policy: StoragePolicy = field(default_factory=lambda: StoragePolicy(Precision.INT4))
    activations: DType = DType.F32  # of the quantized linears
    accuracy_level: int = _INTEGER_ACTIVATIONS

    def plain_linear(self, x: str, linear: Linear) -> str:
        """A linear layer on rows [rows, in_width] → [rows, out_width]."""
        bits = _BITS.get(self.policy.encoding(self.b.program.component, self.b.full_name(linear.weight)))
        if bits is None:
            return super().plain_linear(x, linear)
        weight, out_width, blocks = linear.weight, linear.out_width, linear.in_width // BLOCK_SIZE
        inputs = [
            self.b.cast(x, self.activations),
            self.b.weight(weight, (out_width, blocks, BLOCK_SIZE * bits // 8), DType.U8),
            self.b.cast(self.b.weight(scale_of(weight), (out_width, blocks), DType.F32), self.activations),
        ]
        y = self.b.op(
            "MatMulNBits",
            *inputs,
            name=linear.name,
            contrib=True,
            K=linear.in_width,
            N=out_width,
            bits=bits,
            block_size=BLOCK_SIZE,
            accuracy_level=self.accuracy_level,
        )
        return self.factored(y, linear)
