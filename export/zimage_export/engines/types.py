"""The element types of block programs, for weights and for products, by GPU generation."""

from collections.abc import Callable
from dataclasses import dataclass

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.machine.gpu_targets import Variant

from ..storage.precision import FLOAT32_LINEARS

Stored = Callable[[str, str, tuple[int, ...]], DType]
"""The element type that a bundle stores a tensor in: by component, name and published shape."""


@dataclass(frozen=True)
class EngineTypes:
    """A `TypePolicy` for one block of a bundle.

    The weights' inputs have the type that is computed with, so that the device stores no more than it needs; weights
    are converted when they are uploaded. int8 stays int8.
    """

    stored: Stored
    variant: Variant
    half: DType  # what 16-bit products are in
    full: bool = False  # everything but int8 weights in float32: for checks on the CPU
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
        """Never fp16, except for the attention's products on Turing, which has no bf16."""
        if "norm" in name:
            return DType.F32
        if self.variant is Variant.AMPERE:
            return DType.BF16
        return DType.F16 if ".attentions." in f".{name}" else DType.F32

    def gpu_compute(self, component: str) -> DType:
        """The element type of values that do not come from a weight."""
        if self.full:
            return DType.F32
        if component == "vae":
            return DType.BF16 if self.variant is Variant.AMPERE else DType.F32
        return self.half
