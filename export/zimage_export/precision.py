"""How each precision stores a tensor, and what its programs compute in.

Linear layers hold nearly all parameters and are stored in 16 bits; norms, biases, pad tokens and the small linears
at the model's ends stay float32, and so do the residual stream and every norm's arithmetic. The VAE is never fp16,
whose range it leaves (white or black pictures); it keeps the checkpoint's own type where that is bf16. In a 16-bit
bundle the CPU's programs widen the weights to float32, the CUDA programs multiply in 16 bits.
"""

from dataclasses import dataclass

from zimage_runtime.manifest import Precision
from zimage_runtime.tensors import DType

_HALF = {Precision.BF16: DType.BF16, Precision.FP16: DType.F16}

FLOAT32_LINEARS = ("t_embedder.", "cap_embedder.", "all_x_embedder.", "all_final_layer.")
"""Linears at the transformer's ends: a thousandth of its parameters, and every token passes through them."""


@dataclass(frozen=True)
class StoragePolicy:
    """What a precision stores a component's tensors as. Small enough to be asked for every tensor."""

    precision: Precision
    vae_type: DType = DType.F32  # of the checkpoint's own VAE weights

    def storage(self, component: str, name: str, shape: tuple[int, ...]) -> DType:
        """The stored type of a tensor, by its name in the component and its shape."""
        half = _HALF.get(self.precision)
        if half is None or len(shape) < 2 or name.endswith("_pad_token"):
            return DType.F32
        if component == "vae":
            return DType.BF16 if self.precision is Precision.BF16 or self.vae_type is DType.BF16 else DType.F32
        if component == "transformer" and name.startswith(FLOAT32_LINEARS):
            return DType.F32
        return half

    def cuda_compute(self, component: str) -> DType:
        """What the CUDA programs of a component multiply in."""
        if component == "vae" and self.precision is not Precision.BF16:
            return DType.F32
        return _HALF.get(self.precision, DType.F32)
