"""LoRA's matrices on their way to the device, in the types and the rank that block programs take them in."""

import numpy as np
from numpy.typing import NDArray

from ...adapters.branches import Branches
from ...arrays import FloatArray
from ...bundle.tensors import DType
from ...model.blocks import BlockPlace
from ...model.branches import down_input, factor_input, up_input
from .block_catalog import ProgramSpec
from .stage_sizes import BlockLayout
from .weight_source import convert


def fill_branches(
    target: NDArray[np.uint8],
    branches: Branches,
    place: BlockPlace,
    program: ProgramSpec,
    layout: BlockLayout,
    rank: int,
) -> None:
    """Writes a block's LoRA to `target`, its whole buffer: zeros and factors of one where a layer has none.

    Raises `BundleError` for values beyond fp16's range where a program computes in it.
    """
    linears = [name.removeprefix("lora.").removesuffix(".down") for name in program.branches if name.endswith(".down")]
    for linear in linears:
        name = place.tensor(linear)
        down, up = branches.matrices.get(name, (None, None))
        values = {
            down_input(linear): down,
            up_input(linear): up,
            factor_input(linear): branches.factors.get(name),
        }
        for key, given in values.items():
            spec = program.branches[key]
            shape = tuple(size or rank for size in spec.shape)
            full = _filled(given, shape, 1.0 if key == factor_input(linear) else 0.0)
            start, nbytes = layout.offsets[key], full.size * spec.dtype.size
            part = target[start : start + nbytes].view(spec.dtype.storage).reshape(shape)
            convert(full, DType.F32, part, spec.dtype, f"the LoRA of {name}")


def _filled(values: FloatArray | None, shape: tuple[int, ...], nothing: float) -> FloatArray:
    """Values in the corner of an array of `shape`, the rest of which is `nothing`."""
    found = np.full(shape, nothing, np.float32)
    if values is not None:
        found[tuple(slice(size) for size in values.shape)] = values
    return found
