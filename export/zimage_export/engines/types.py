"""What block programs take their weights in, and compute in, for a GPU generation."""

from collections.abc import Callable
from dataclasses import dataclass

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.machine.gpu_targets import Variant

from ..storage.precision import FLOAT32_LINEARS

Stored = Callable[[str, str, tuple[int, ...]], DType]
"""What a bundle stores a tensor in: by component, name and published shape."""


@dataclass(frozen=True)
class EngineTypes:
    """A `TypePolicy` for one block of a bundle.

    The weights' inputs are of the type that they are computed with, so that the device holds no more than it needs;
    whoever uploads converts. int8 stays int8.
    """

    stored: Stored
    variant: Variant
    half: DType  # what 16-bit products are in
    full: bool = False  # all in float32 but int8 weights: the twin, which the CPU runs
    prefix: str = ""  # of the block's names in the component

    def storage(self, component: str, name: str, shape: tuple[int, ...]) -> DType:
        """The element type of a weight's input."""
        stored = self.stored(component, f"{self.prefix}{name}", shape)
        if stored is DType.I8:
            return DType.I8
        if self.full:
            return DType.F32
        if component == "vae":
            return self._vae(f"{self.prefix}{name}")
        if len(shape) < 2 or name.endswith("_pad_token"):
            return DType.F32
        if component == "transformer" and name.startswith(FLOAT32_LINEARS) and self.variant is Variant.AMPERE:
            return DType.F32
        return self.half

    def _vae(self, name: str) -> DType:
        """Never fp16, but for the attention's products on Turing, which has no others."""
        if "norm" in name:
            return DType.F32
        if self.variant is Variant.AMPERE:
            return DType.BF16
        return DType.F16 if ".attentions." in f".{name}" else DType.F32

    def cuda_compute(self, component: str) -> DType:
        """What values that come from no weight are computed in."""
        if self.full:
            return DType.F32
        if component == "vae":
            return DType.BF16 if self.variant is Variant.AMPERE else DType.F32
        return self.half
