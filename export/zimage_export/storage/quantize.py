"""Weights as integers: scales with the least error, and values as a bundle stores them.

int8 has one scale per output channel. The largest magnitude of a channel need not be representable: clipping a few
values makes the steps of all others smaller. The clipping of least squared error is computed for each channel. int4
has one scale per block of 32 inputs, and the clipping is chosen by trying each. All quantization is symmetric: no zero
point is subtracted at run time.
"""

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.rebalancing import Factors
from zimage_runtime.bundle.stored_weights import dequantized
from zimage_runtime.bundle.tensors import DType

from ..errors import ExportError
from ..source.tensors import TensorSource
from .feedback import Feedback, Moments
from .precision import BLOCK_SIZE, Encoding, scale_of
from .stored import NO_FACTORS, LazyFactors, StoredTensor, row_chunks

Integers = NDArray[np.generic]

INT8_MOST = 127
_PIECE_BYTES = 16 << 20
_INT8_CUTS = np.array([1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7], np.float32)
_INT4_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74)


def quantized(
    source: TensorSource,
    encoding: Encoding,
    factors: LazyFactors | None = None,
    exponent: int = 0,
    moments: Moments | None = None,
) -> list[StoredTensor]:
    """A linear layer's weight, times its factors and 2**exponent, and its scales, as the bundle stores them.

    With `moments` of its inputs as the checkpoint has them, without factors, int4 is rounded with error feedback.
    """

    @functools.cache
    def both() -> tuple[Integers, FloatArray]:
        given = factors() if factors else NO_FACTORS
        return _stored(source, encoding, _with_exponent(given, exponent, source.shape[0]), moments)

    kept: dict[str, Integers] = {}

    def values() -> Iterator[Integers]:
        integers, kept["scale"] = both()
        both.cache_clear()  # the integers are needed once; what is kept is their scales
        flat = integers.reshape(-1)  # in pieces, so that few whole tensors wait to be written
        yield from (flat[start : start + _PIECE_BYTES] for start in range(0, len(flat), _PIECE_BYTES))

    def scales() -> Iterator[Integers]:
        yield kept.pop("scale") if "scale" in kept else both()[1]
        both.cache_clear()

    shape, dtype, scale_shape = _layout(source.shape, encoding)
    return [
        StoredTensor(source.name, dtype, shape, values),
        StoredTensor(scale_of(source.name), DType.F32, scale_shape, scales),
    ]


def _with_exponent(factors: Factors, exponent: int, out_width: int) -> Factors:
    if not exponent:
        return factors
    rows = np.full(out_width, 2.0**exponent, np.float32)
    return Factors(rows if factors.rows is None else rows * factors.rows, factors.columns)


def _layout(shape: tuple[int, ...], encoding: Encoding) -> tuple[tuple[int, ...], DType, tuple[int, ...]]:
    """Stored shape and type of a weight [out, in], and the shape of its scales."""
    out_width, in_width = shape
    if encoding is Encoding.INT8:
        return (in_width, out_width), DType.I8, (out_width,)
    blocks = in_width // BLOCK_SIZE
    inner = BLOCK_SIZE // 2 if encoding is Encoding.BLOCKS4 else BLOCK_SIZE
    return (out_width, blocks, inner), DType.U8, (out_width, blocks)


def _stored(
    source: TensorSource, encoding: Encoding, factors: Factors, moments: Moments | None
) -> tuple[Integers, FloatArray]:
    """The whole weight: one tensor in memory, as integers."""
    feedback = Feedback.of(moments, factors.columns) if moments else None
    shape, dtype, scale_shape = _layout(source.shape, encoding)
    integers, scales = np.empty(shape, dtype.storage), np.empty(scale_shape, np.float32)
    for first, weights in row_chunks(source, factors):
        rows = slice(first, first + len(weights))
        if encoding is Encoding.INT8:
            values, scales[rows] = int8_rows(weights)
            integers[:, rows] = values.T
        elif encoding is Encoding.BLOCKS8:
            integers[rows], scales[rows] = blocks8(weights)
        else:
            integers[rows], scales[rows] = blocks4(weights, feedback)
        if not np.isfinite(scales[rows]).all():
            raise ExportError(f"{source.name}: holds values that are not finite; is the checkpoint damaged?")
    return integers, scales


def int8_rows(weights: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """Rows [rows, width] → int8 values of the same shape, and one scale per row."""
    scales = int8_scales(weights)
    values = weights * (np.float32(1) / scales)[:, None]
    np.rint(values, out=values)
    np.clip(values, -INT8_MOST, INT8_MOST, out=values)
    return values.astype(np.int8), scales


def int8_scales(weights: FloatArray) -> FloatArray:
    """The scale of each row with the least squared error.

    Rounding to steps of size d costs d²/12 per value, which is accurate at 255 steps per row. The cost of clipping is
    summed over the few values beyond it.
    """
    magnitudes = np.abs(weights)
    peaks = np.maximum(magnitudes.max(axis=1), np.float32(1e-30))
    rows, columns = np.nonzero(magnitudes > peaks[:, None] * _INT8_CUTS[-1])
    beyond = magnitudes[rows, columns] / peaks[rows]
    errors = np.empty((len(_INT8_CUTS), len(weights)))
    for index, cut in enumerate(_INT8_CUTS):
        excess = np.square(np.maximum(beyond - cut, 0), dtype=np.float64)
        rounding = weights.shape[1] * (float(cut) / INT8_MOST) ** 2 / 12
        errors[index] = rounding + np.bincount(rows, weights=excess, minlength=len(weights))
    scales: FloatArray = peaks * _INT8_CUTS[errors.argmin(axis=0)] / np.float32(INT8_MOST)
    return scales


def blocks4(weights: FloatArray, feedback: Feedback | None = None) -> tuple[NDArray[np.uint8], FloatArray]:
    """Rows [rows, width] → bytes [rows, width / 32, 16], the first value in the low four bits, and scales."""
    blocks = weights.reshape(len(weights), -1, BLOCK_SIZE)
    # -8 can be stored and 8 cannot, so the value of the largest magnitude is the one that becomes -8
    peaks = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    full = np.where(peaks == 0, np.float32(1), peaks / np.float32(-8))
    best, scales = np.full(full.shape, np.inf, np.float32), full
    for cut in _INT4_CUTS:
        scale = full * np.float32(cut)
        off = _steps(blocks, scale)
        off *= scale[..., None]
        off -= blocks
        error = np.einsum("rbi,rbi->rb", off, off)
        scales = np.where(error < best, scale, scales)
        best = np.minimum(best, error)
    values = _steps(blocks, scales)
    square = np.einsum("rbi,rbi->rb", values, values)
    # for these integers, the scale of least error
    scales = np.where(square > 0, np.einsum("rbi,rbi->rb", values, blocks) / np.maximum(square, 1), scales)
    if feedback:
        steps = np.repeat(scales.astype(np.float32), BLOCK_SIZE, axis=1)
        values = feedback.rounded(weights, steps, -8, 7).reshape(blocks.shape)
    nibbles = (values + 8).astype(np.uint8)
    packed = np.bitwise_or(nibbles[..., 0::2], np.left_shift(nibbles[..., 1::2], 4), dtype=np.uint8)
    return packed, scales.astype(np.float32)


def _steps(blocks: FloatArray, scales: FloatArray) -> FloatArray:
    values: FloatArray = blocks * (np.float32(1) / scales)[..., None]
    np.rint(values, out=values)
    np.clip(values, -8, 7, out=values)
    return values


def blocks8(weights: FloatArray) -> tuple[NDArray[np.uint8], FloatArray]:
    """Rows [rows, width] → bytes [rows, width / 32, 32] around 128, and scales; at 8 bits, clipping does not pay."""
    blocks = weights.reshape(len(weights), -1, BLOCK_SIZE)
    peaks = np.abs(blocks).max(axis=-1)
    scales = np.where(peaks == 0, np.float32(1), peaks / np.float32(INT8_MOST))
    return (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8), scales


def rounded(weights: FloatArray, encoding: Encoding) -> FloatArray:
    """The values that rows [rows, width] have after they were stored."""
    if encoding is Encoding.INT8:
        values, scales = int8_rows(weights)
        return dequantized(values.T, scales)
    integers, scales = blocks4(weights) if encoding is Encoding.BLOCKS4 else blocks8(weights)
    return dequantized(integers, scales)
