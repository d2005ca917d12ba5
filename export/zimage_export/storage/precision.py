"""How each precision stores a tensor, and what its programs compute in.

Linear layers hold nearly all parameters and are stored in 16 bits; norms, biases, pad tokens and the small linears
at the model's ends stay float32, and so do the residual stream and every norm's arithmetic. The VAE is never fp16,
whose range it exceeds (white or black images); it keeps the checkpoint's own type where that is bf16. In a 16-bit
bundle the CPU's programs widen the weights to float32, the CUDA programs multiply in 16 bits.

In an int8 or int4 bundle the linears of the blocks are integers with float32 scales, modulation is bf16, and everything
else is float32. A ControlNet's projections are bf16 there, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.stored_weights import BLOCK_SIZE as BLOCK_SIZE
from zimage_runtime.bundle.stored_weights import SCALE_SUFFIX as SCALE_SUFFIX
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.control import AFTER, BEFORE, COMPONENT
from zimage_runtime.model.linears import LAYER_LINEARS

_HALF = {Precision.BF16: DType.BF16, Precision.FP16: DType.F16}

FLOAT32_LINEARS = ("t_embedder.", "cap_embedder.", "all_x_embedder.", "all_final_layer.", "control_all_x_embedder.")
"""Linears at the ends of the transformer and of a ControlNet: a thousandth of the parameters, and every token passes
through them."""

_PROJECTIONS = (f".{BEFORE}.weight", f".{AFTER}.weight")
"""A ControlNet's linears between its tokens and the model's. They read what no norm has evened out, of which integers
with a scale for each token would keep little."""


class Encoding(StrEnum):
    """How the weight of a linear layer is stored."""

    FLOAT = "float"  # [out, in], in a floating-point type
    INT8 = "int8"  # [in, out] int8, one float32 scale per output channel
    BLOCKS8 = "blocks8"  # [out, in / 32, 32] uint8 around 128, one float32 scale per block of 32 inputs
    BLOCKS4 = "blocks4"  # [out, in / 32, 16] uint8, two values around 8 in each; scales as above


_QUANTIZED = tuple(f".{name}.weight" for names in LAYER_LINEARS.values() for name in names)
"""The linears of the transformer's and the text encoder's blocks: all but a fiftieth of the parameters."""


def scale_of(weight: str) -> str:
    """The name of a weight's scales."""
    return weight + SCALE_SUFFIX


def linear_shape(stored: tuple[int, ...], encoding: Encoding) -> tuple[int, ...]:
    """The shape [out, in] of a linear layer whose weight is stored in this shape."""
    if encoding is Encoding.INT8:
        return stored[::-1]
    return stored[0], stored[1] * BLOCK_SIZE


@dataclass(frozen=True)
class StoragePolicy:
    """How a precision stores a component's tensors."""

    precision: Precision
    vae_type: DType = DType.F32  # of the checkpoint's own VAE weights
    timestep_type: DType = DType.F32  # of its timestep embedder
    eight_bits: frozenset[str] = field(default_factory=frozenset)  # int4: `component/weight` that keep 8 bits
    calibrated: bool = False  # activations were measured
    rotations: Mapping[str, int] = field(default_factory=dict)  # int8: `component/weight`, inputs rotated together

    @property
    def rebalanced(self) -> bool:
        """Whether magnitudes are moved between activations and weights: where activations share scales.

        int8 has one scale for a whole token, int4 one for 32 neighbouring channels and weights: a loud channel spoils
        fewer others. It pays together with error feedback, which needs measured activations too.
        """
        return self.precision is Precision.INT8 or (self.precision is Precision.INT4 and self.calibrated)

    def encoding(self, component: str, name: str) -> Encoding:
        """How the weight of a linear layer is stored, by its name in the component."""
        quantized = component != "vae" and name.endswith(_QUANTIZED)
        if self.precision is Precision.INT8 and quantized:
            return Encoding.INT8
        if self.precision is Precision.INT4 and quantized:
            return Encoding.BLOCKS8 if f"{component}/{name}" in self.eight_bits else Encoding.BLOCKS4
        return Encoding.FLOAT

    def rotation(self, component: str, name: str) -> int:
        """How many inputs of a linear layer are rotated together before they are quantized; 0 for none."""
        return self.rotations.get(f"{component}/{name}", 0)

    def storage(self, component: str, name: str, shape: tuple[int, ...]) -> DType:
        """The stored type of a tensor that is not quantized, by its name in the component and its shape."""
        if self.precision in (Precision.INT8, Precision.INT4):
            return DType.BF16 if len(shape) == 2 and _in_sixteen_bits(name) else DType.F32
        half = _HALF.get(self.precision)
        if half is None or len(shape) < 2 or name.endswith("_pad_token"):
            return DType.F32
        if component == "vae":
            return DType.BF16 if self.precision is Precision.BF16 or self.vae_type is DType.BF16 else DType.F32
        if component in ("transformer", COMPONENT) and name.startswith(FLOAT32_LINEARS):
            # the timestep is embedded on the CPU, in float32: what has 16 bits already loses nothing in them
            return self.timestep_type if name.startswith("t_embedder.") else DType.F32
        return half

    def gpu_compute(self, component: str) -> DType:
        """What a GPU's programs of a component multiply in."""
        if component == "vae" and self.precision is not Precision.BF16:
            return DType.F32
        return _HALF.get(self.precision, DType.F32)


def _in_sixteen_bits(name: str) -> bool:
    """Whether a matrix of an int8 or int4 bundle has 16 bits: of modulation, or between a ControlNet and the model."""
    return name.endswith(_PROJECTIONS) or (".adaLN_modulation." in name and not name.startswith(FLOAT32_LINEARS))
