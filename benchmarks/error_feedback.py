"""Error feedback for quantized weights, as the benchmarks try it: moments of activations, and GPTQ (arXiv 2210.17323).

A weight's columns are rounded one after another. The error that one leaves in the outputs is made up for by the columns
that are not rounded yet, as far as their inputs go together with its own: that is what second moments of the inputs
[width, width] tell.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimage_export.source.checkpoint import Checkpoint
from zimage_export.storage.precision import BLOCK_SIZE
from zimage_export.storage.quantize import INT8_MOST, blocks4, int8_scales
from zimage_export.weights.folding import blocks
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.rebalancing import PLACES

Square = NDArray[np.float64]
Moments = dict[str, Square]
"""By a linear's weight (names differ between components): the mean of x · xᵀ over what the linear reads."""

_DAMPING = 0.01  # of the mean of the diagonal, added to it
_LAZY = 128  # columns after which the rest of a weight is corrected


def measured_moments(checkpoint: Path, prompts: Sequence[str]) -> Moments:
    """What the linears of all blocks read while each prompt is generated once by diffusers."""
    import torch

    from zimage_export.measure.calibrate import generate_latents
    from zimage_export.measure.reference import reference_pipeline

    opened = Checkpoint.open(checkpoint)
    pipeline = reference_pipeline(opened)
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def meter(name: str) -> Callable[[Any, Any], None]:
        def add(module: Any, inputs: Any) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    readers: dict[str, tuple[str, ...]] = {}
    for component, names in blocks(opened.config).items():
        for block in names:
            for place in PLACES[component]:
                first = f"{block}.{place.readers[0]}"
                module = getattr(pipeline, component).get_submodule(first.removesuffix(".weight"))
                module.register_forward_pre_hook(meter(first))
                readers[first] = tuple(f"{block}.{reader}" for reader in place.readers)
    side = opened.config.vae.sample_size
    with torch.inference_mode():
        generate_latents(pipeline, prompts, side)
    return {reader: (total / counts[first]).numpy() for first, total in sums.items() for reader in readers[first]}


def int8_with_feedback(weights: FloatArray, moments: Square, group: int) -> tuple[NDArray[np.int8], FloatArray]:
    """Rows [rows, width] → int8 values of the same shape, and one scale per row: as `int8_rows`, with feedback."""
    scales = int8_scales(weights)
    column_scales = np.broadcast_to(scales[:, None].astype(np.float64), weights.shape)
    values = _in_groups(weights, moments, group, column_scales, (-INT8_MOST, INT8_MOST))
    return values.astype(np.int8), scales


def int4_with_feedback(weights: FloatArray, moments: Square, group: int) -> tuple[NDArray[np.uint8], FloatArray]:
    """Rows [rows, width] → bytes and scales as `blocks4` gives, whose scales are kept."""
    _, scales = blocks4(weights)
    safe = np.where(scales == 0, np.float32(1), scales)
    column_scales = np.repeat(safe.astype(np.float64), BLOCK_SIZE, axis=1)
    values = _in_groups(weights, moments, group, column_scales, (-8, 7)).reshape(len(weights), -1, BLOCK_SIZE)
    nibbles = (values + 8).astype(np.uint8)
    packed = np.bitwise_or(nibbles[..., 0::2], np.left_shift(nibbles[..., 1::2], 4), dtype=np.uint8)
    return packed, safe.astype(np.float32)


def _in_groups(weights: FloatArray, moments: Square, group: int, scales: Square, bounds: tuple[int, int]) -> Square:
    """Integers [rows, width]; columns make up for errors of those in the same group of neighbours."""
    found = []
    for first in range(0, weights.shape[1], group):
        own = slice(first, first + group)
        found.append(_rounded_in_turn(weights[:, own], moments[own, own], scales[:, own], bounds))
    return np.concatenate(found, axis=1)


def _rounded_in_turn(weights: FloatArray, moments: Square, scales: Square, bounds: tuple[int, int]) -> Square:
    """Integers [rows, width]. The columns whose inputs are largest are rounded first."""
    order = np.argsort(-np.diag(moments), kind="stable")
    left = weights[:, order].astype(np.float64)
    scales, width = scales[:, order], left.shape[1]
    damped = moments[np.ix_(order, order)] + np.eye(width) * (_DAMPING * np.mean(np.diag(moments)) + 1e-30)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    found = np.empty_like(left)
    for start in range(0, width, _LAZY):
        end = min(start + _LAZY, width)
        errors = np.empty((len(left), end - start))
        for column in range(start, end):
            step = scales[:, column]
            found[:, column] = np.clip(np.rint(left[:, column] / step), *bounds)
            error = (left[:, column] - found[:, column] * step) / upper[column, column]
            left[:, column + 1 : end] -= error[:, None] * upper[column, column + 1 : end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    integers = np.empty_like(found)
    integers[:, order] = found
    return integers
