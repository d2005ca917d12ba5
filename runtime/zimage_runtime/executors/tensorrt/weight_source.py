"""Weights on their way from the mapped files to the device.

`WeightSource.tensor` reads every weight, by name: this is the place to change one, to add a LoRA's delta, say. What is
read is converted to the type of the program's input.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...bundle.bundle import Bundle
from ...bundle.tensors import DType, TensorFile, to_float32
from ...errors import BundleError
from ...machine.cores import thread_count
from ...model.blocks import BlockPlace
from .block_catalog import BlockSpec, InputSpec, ProgramSpec
from .stage_sizes import BlockLayout

_FP16_MAX = 65504.0
_STRIP = 32  # rows that are transposed together: a column of them is half a line of the cache
_TRANSPOSERS = 4  # threads
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

        An input of several tensors gets them one after the other. Raises `BundleError` for tensors of another shape
        or type than the program's input.
        """
        for name, offset in layout.offsets.items():
            if name in block.scalars:
                target[offset : offset + 4].view(np.float32)[0] = block.scalars[name]
                continue
            spec = program.weights[name]
            destination = target[offset : offset + spec.nbytes].view(spec.dtype.storage).reshape(spec.shape)
            row, tensors = 0, [place.tensor(part) for part in spec.parts or (name,)]
            for tensor in tensors:
                values, dtype = self.tensor(place.kind.component, tensor)
                shape = values.shape[::-1] if spec.transposed else values.shape
                part = destination[row : row + shape[0]] if shape else destination
                if part.shape != shape:
                    raise self._misfit(tensor, values.shape, spec)
                fill = transpose if spec.transposed else convert
                fill(values, dtype, part, spec.dtype, tensor)
                row += shape[0] if shape else 0
            if spec.shape and row != spec.shape[0]:
                raise self._misfit(" and ".join(tensors), (row, *spec.shape[1:]), spec)

    def _misfit(self, tensor: str, shape: tuple[int, ...], spec: InputSpec) -> BundleError:
        return BundleError(
            f"{self.bundle.root}: {tensor} has shape {list(shape)}, its block program takes {list(spec.shape)}; run "
            "zimage-export engines again"
        )

    def embedded(self, component: str, name: str) -> NDArray[np.float32]:
        """A small weight in float32, for what the host computes."""
        return to_float32(*self.tensor(component, name))

    def close(self) -> None:
        """Closes the mapped files."""
        self._files.clear()


def convert(values: NDArray[np.generic], dtype: DType, target: NDArray[np.generic], wanted: DType, name: str) -> None:
    """Converts stored elements, rounding to nearest even. `target` is contiguous.

    Raises `BundleError` for integers of another type than `wanted`, and for values that fp16 cannot represent.
    """
    if dtype is wanted:
        np.copyto(target, values)
        return
    _check_integers(dtype, wanted, name)
    values, target = values.reshape(-1), target.reshape(-1)
    for start in range(0, len(values), _PIECE):
        piece = to_float32(values[start : start + _PIECE], dtype)
        if wanted is DType.F16 and piece.size and float(np.abs(piece).max()) > _FP16_MAX:
            raise BundleError(
                f"{name}: contains values beyond fp16's range, and this GPU computes in fp16; use a bundle made with "
                "--precision fp16"
            )
        target[start : start + _PIECE] = _bf16(piece) if wanted is DType.BF16 else piece.astype(wanted.storage)


def transpose(values: NDArray[np.generic], dtype: DType, target: NDArray[np.generic], wanted: DType, name: str) -> None:
    """[in, out] → [out, in] of integers. Raises `BundleError` for elements of another type than `wanted`."""
    _check_integers(dtype, wanted, name)
    count = values.shape[0]
    # threads, since one of them moves half a gigabyte a second; a strip's rows stay in the processor's cache
    with ThreadPoolExecutor(min(_TRANSPOSERS, thread_count())) as threads:
        strips = [slice(start, start + _STRIP) for start in range(0, count, _STRIP)]
        for _ in threads.map(lambda strip: np.copyto(target[:, strip], values[strip].T), strips):
            pass


def _check_integers(dtype: DType, wanted: DType, name: str) -> None:
    if dtype is not wanted and (DType.I8 in (dtype, wanted) or DType.U8 in (dtype, wanted)):
        raise BundleError(
            f"{name}: is stored as {dtype}, its block program takes {wanted}; run zimage-export engines again"
        )


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 → bfloat16's bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> 16) & 1
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
