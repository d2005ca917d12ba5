"""Weights on their way from the mapped files to the device.

`WeightSource.tensor` reads every weight, by name: this is the place to change one, to add a LoRA's delta, say. What is
read is converted to the type of the program's input.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...bundle.bundle import Bundle
from ...bundle.tensors import DType, TensorFile, to_float32
from ...errors import BundleError
from ...model.blocks import BlockPlace
from .block_catalog import BlockSpec, ProgramSpec
from .stage_sizes import BlockLayout

_FP16_MAX = 65504.0
_PIECE = 1 << 22  # elements that are converted at once; fastest while they fit the processor's cache


@dataclass
class WeightSource:
    """A bundle's weights by component and name."""

    bundle: Bundle
    _files: dict[str, TensorFile] = field(default_factory=dict)

    def tensor(self, component: str, name: str) -> tuple[NDArray[np.generic], DType]:
        """A weight's stored elements and their type. All weights are read here."""
        if component not in self._files:
            self._files[component] = TensorFile(self.bundle.file(self.bundle.manifest.weights[component]))
        return self._files[component].array(name)

    def fill(
        self, target: NDArray[np.uint8], place: BlockPlace, program: ProgramSpec, block: BlockSpec, layout: BlockLayout
    ) -> None:
        """Writes a block's weights and scalars to `target`, the block's whole buffer, as its layout says.

        Raises `BundleError` for a tensor of another shape or type than the program's input.
        """
        for name, offset in layout.offsets.items():
            if name in block.scalars:
                target[offset : offset + 4].view(np.float32)[0] = block.scalars[name]
                continue
            spec = program.weights[name]
            tensor = place.tensor(name)
            values, dtype = self.tensor(place.kind.component, tensor)
            if values.shape != spec.shape:
                raise BundleError(
                    f"{self.bundle.root}: {tensor} has shape {list(values.shape)}, its block program takes "
                    f"{list(spec.shape)}; run zimage-export engines again"
                )
            destination = target[offset : offset + spec.nbytes].view(spec.dtype.storage)
            convert(values.reshape(-1), dtype, destination, spec.dtype, tensor)

    def embedded(self, component: str, name: str) -> NDArray[np.float32]:
        """A small weight in float32, for what the host computes."""
        return to_float32(*self.tensor(component, name))

    def close(self) -> None:
        """Closes the mapped files."""
        self._files.clear()


def convert(values: NDArray[np.generic], dtype: DType, target: NDArray[np.generic], wanted: DType, name: str) -> None:
    """Converts stored elements, rounding to nearest even.

    Raises `BundleError` for integers of another type than `wanted`, and for values that fp16 cannot represent.
    """
    if dtype is wanted:
        np.copyto(target, values)
        return
    if DType.I8 in (dtype, wanted) or DType.U8 in (dtype, wanted):
        raise BundleError(
            f"{name}: is stored as {dtype}, its block program takes {wanted}; run zimage-export engines again"
        )
    for start in range(0, len(values), _PIECE):
        piece = to_float32(values[start : start + _PIECE], dtype)
        if wanted is DType.F16 and piece.size and float(np.abs(piece).max()) > _FP16_MAX:
            raise BundleError(
                f"{name}: contains values beyond fp16's range, and this GPU computes in fp16; use a bundle made with "
                "--precision fp16"
            )
        target[start : start + _PIECE] = _bf16(piece) if wanted is DType.BF16 else piece.astype(wanted.storage)


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 → bfloat16's bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> 16) & 1
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
