"""How a bundle's weights are stored and computed with, and how far from its checkpoint each precision may be."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Gate:
    """The largest distance to the checkpoint in float32, with the same prompt and seed, that passes."""

    latents: float  # relative error after the last step
    psnr_db: float  # of the image, at least
    max_difference: int = 255  # of a pixel's channel, in 255ths


class Precision(StrEnum):
    """How a bundle's weights are stored and computed with."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def gate(self) -> Gate:
        """The limits that `zimage-export verify` and `zimage-rt bench` set for a bundle."""
        return _GATES[self]


_GATES = {
    Precision.FP32: Gate(latents=1e-4, psnr_db=48.0, max_difference=1),
    # twenty times what a small model shows: errors grow with depth, and few-step images with them
    Precision.BF16: Gate(latents=0.1, psnr_db=25.0),
    Precision.FP16: Gate(latents=0.02, psnr_db=35.0),
    # a small model shows 0.017 and 50 dB, 0.08 and 38 dB; saturated integer products, 0.14 and 32 dB
    Precision.INT8: Gate(latents=0.1, psnr_db=34.0),
    Precision.INT4: Gate(latents=0.3, psnr_db=25.0),
}
