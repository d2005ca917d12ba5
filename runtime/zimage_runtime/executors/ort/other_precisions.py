"""How much of a GPU's memory a bundle of the same model would need in another precision.

Precisions store the linears of the blocks in different ways. Everything else is float32 in all of them, except the
autoencoder, which has 16 bits in a 16-bit bundle.
"""

import dataclasses
from collections.abc import Mapping

from ...bundle.manifest import CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY, Manifest, Precision, ProgramRecord
from ...model.blocks import program_blocks
from ...model.config import ModelConfig
from ...model.linears import block_linears
from ...model.programs import Program
from .int8_denoiser import INT8_PRODUCTS, Capability

_BITS: dict[Precision, float] = {
    Precision.FP32: 32,
    Precision.BF16: 16,
    Precision.FP16: 16,
    Precision.INT8: 8,
    # one float32 scale per 32 values; at most a tenth of the parameters keeps 8 bits
    Precision.INT4: 0.9 * (4 + 1) + 0.1 * (8 + 1),
}
_SCALE = 4  # bytes per output channel of an int8 linear
_HALVES = (Precision.BF16, Precision.FP16)


_DISTANCE = {Precision.FP32: 0, Precision.BF16: 1, Precision.FP16: 1, Precision.INT8: 2, Precision.INT4: 3}


def nearer(one: Precision, other: Precision) -> bool:
    """Whether a bundle in `one` is nearer to the original model than one in `other`."""
    return _DISTANCE[one] < _DISTANCE[other]


def candidates(capability: Capability | None) -> tuple[Precision, ...]:
    """The precisions that suit a GPU, the nearest to the original first. Without a capability, it has bfloat16.

    int4 comes last: it is widened to fp16 for every product, and only saves memory.
    """
    half = Precision.BF16 if capability is None or capability >= (8, 0) else Precision.FP16
    int8 = (Precision.INT8,) if capability is None or capability >= INT8_PRODUCTS else ()
    return (half, *int8, Precision.INT4)


def advised(peaks: Mapping[Precision, int], budget: int, capability: Capability | None) -> Precision | None:
    """The best precision, among those with a known peak, for a budget in bytes; None where none fits."""
    fitting = (p for p in candidates(capability) if p in peaks and peaks[p] <= budget)
    return next(fitting, None)


def as_precision(manifest: Manifest, precision: Precision) -> Manifest:
    """A manifest as if the bundle had another precision. Only the sizes of its programs' weights are right."""
    programs = {}
    for program, records in manifest.programs.items():
        converted = {}
        if record := records.get(CUDA):
            size = _weights(program, record.weight_bytes, manifest, precision)
            several = precision is Precision.INT8 and program is Program.DENOISER
            names = (CUDA, CUDA_WEIGHT_ONLY, CUDA_BLOCKS) if several else (CUDA,)
            converted = {name: ProgramRecord("", size) for name in names}
        programs[program] = converted
    return dataclasses.replace(manifest, precision=precision, programs=programs)


def _weights(program: Program, size: int, manifest: Manifest, precision: Precision) -> int:
    if program.component == "vae":
        return size * _autoencoder_bytes(precision) // _autoencoder_bytes(manifest.precision)
    shapes = _linears(program, manifest.config)
    return size - _linear_bytes(shapes, manifest.precision) + _linear_bytes(shapes, precision)


def _autoencoder_bytes(precision: Precision) -> int:
    return 2 if precision in _HALVES else 4


def _linear_bytes(shapes: list[tuple[int, int]], precision: Precision) -> int:
    scales = sum(out for out, _ in shapes) * _SCALE if precision is Precision.INT8 else 0
    return int(sum(out * inside for out, inside in shapes) * _BITS[precision] / 8) + scales


def _linears(program: Program, config: ModelConfig) -> list[tuple[int, int]]:
    """The shapes [out, in] of the linears of a program's layers."""
    layers = (place for place in program_blocks(program, config) if place.kind.is_layer)
    return [(linear.out_width, linear.in_width) for place in layers for linear in block_linears(place, config)]
