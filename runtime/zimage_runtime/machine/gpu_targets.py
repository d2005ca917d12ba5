"""GPU generations that engines are built for, and the two sets of block programs for them."""

from enum import StrEnum


class Variant(StrEnum):
    """A set of block programs. Turing's use no bf16 and, because of TensorRT for RTX, no float32 matrix products."""

    TURING = "sm75"
    AMPERE = "sm80"  # and all later ones


class GpuTarget(StrEnum):
    """The GPUs that an engine is built for. Names are compute capabilities without the dot."""

    SM75 = "sm75"
    SM80 = "sm80"
    SM86 = "sm86"
    SM89 = "sm89"
    SM120 = "sm120"
    PORTABLE = "portable"  # all from 8.0 on

    @property
    def variant(self) -> Variant:
        """The set of block programs that it runs."""
        return Variant.TURING if self is GpuTarget.SM75 else Variant.AMPERE

    @property
    def capability(self) -> tuple[int, int] | None:
        """Its compute capability; None where there are several."""
        digits = self.value.removeprefix("sm")
        return (int(digits[:-1]), int(digits[-1])) if digits.isdigit() else None

    @property
    def label(self) -> str:
        """What people call it."""
        return _LABELS[self]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether an engine for this target runs on a GPU of a compute capability."""
        if self is GpuTarget.PORTABLE:
            return capability >= (8, 0)
        return self.value == f"sm{capability[0]}{capability[1]}"


_LABELS = {
    GpuTarget.SM75: "Turing: RTX 20, GTX 16, T4",
    GpuTarget.SM80: "Ampere: A100, A30",
    GpuTarget.SM86: "Ampere: RTX 30, A10",
    GpuTarget.SM89: "Ada: RTX 40, L4",
    GpuTarget.SM120: "Blackwell: RTX 50",
    GpuTarget.PORTABLE: "any from Ampere on",
}

OLDEST = (7, 5)
"""The oldest compute capability that TensorRT for RTX supports."""


def variant_of(capability: tuple[int, int]) -> Variant:
    """The set of block programs for a GPU."""
    return Variant.TURING if capability < (8, 0) else Variant.AMPERE


def gpu_of(capability: tuple[int, int]) -> GpuTarget:
    """The most specific target for a GPU."""
    return next(
        (gpu for gpu in GpuTarget if gpu is not GpuTarget.PORTABLE and gpu.runs_on(capability)), GpuTarget.PORTABLE
    )
