"""Choosing the powers of two that keep fp16 in range: from the weights alone, or from measured activations.

Dividing a stored fp16 weight by 2**k costs nothing until its values go subnormal (below 6e-5), and buys k bits of
range. So the weights alone determine how much may be divided out: as much as does not add to the rounding error, at
most 2**6. Where measured activations need more than that, the rest is divided out of the SwiGLU product at run time.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.model.blocks import layer_blocks
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.linears import LAYER_LINEARS

from ..errors import ExportError
from ..source.checkpoint import Checkpoint
from ..source.weights import Weights
from ..storage.feedback import Moments
from ..storage.folds import BlockFold, Folds, folded_weights

FP16_MAX = 65504.0
HEADROOM = 8.0
"""Activations of other prompts, and partial sums inside a product, may be this much above what was measured."""

_MOST = 6  # NVIDIA's own builder for this model divides by 2**6 too
_MOST_PRODUCT = 12
_MOST_ATTENTION = 9  # rounding in fp16 is four times what it was (measured on normal weights of deviation 0.01)
_MARGIN = 2.0  # over what was measured, for other prompts
_SAFE_DEVIATION = 1e-2 / 2**_MOST  # below it, fp16 rounding grows by more than a few percent (measured)
_SAMPLE_ROWS = 64

Peaks = Mapping[str, Mapping[str, "BlockPeak"]]
"""By component and block."""


@dataclass(frozen=True)
class ActivationRange:
    """How large the activations are that a linear reads, per channel."""

    rms: NDArray[np.float32]  # [width]
    peak: NDArray[np.float32]  # [width], the largest magnitude
    moments: Moments | None = None  # how channels vary together, where that was measured


class BlockPeak:
    """The largest magnitudes seen in a block without any fold."""

    def __init__(self) -> None:
        self.attention = 0.0  # the output of the out-projection (Qwen3: input and output of o_proj)
        self.product = 0.0  # the SwiGLU product
        self.ffn = 0.0  # the output of w2
        self.places: dict[str, ActivationRange] = {}  # by the linear that reads them, as in `rebalancing.PLACES`


def blocks(config: ModelConfig) -> dict[str, list[str]]:
    """The names of all layers, by component."""
    return {part: [place.name for place in layer_blocks(part, config)] for part in ("transformer", "text_encoder")}


def choose_folds(checkpoint: Checkpoint, peaks: Peaks | None = None) -> dict[str, Folds]:
    """The folds of every block. With `peaks`, which `calibrate` measures, more is divided out where necessary."""
    return {
        component: {
            block: _choose(checkpoint.weights(component), component, block, (peaks or {}).get(component, {}).get(block))
            for block in names
        }
        for component, names in blocks(checkpoint.config).items()
    }


def free_folds(weights: Weights, names: Iterable[str]) -> Folds:
    """The folds of blocks like the transformer's, from the weights alone."""
    return {block: _choose(weights, "transformer", block, None) for block in names}


def _choose(weights: Weights, component: str, block: str, peak: BlockPeak | None) -> BlockFold:
    attention, ffn = (_largest_free_fold(weights, name) for name in folded_weights(component, block))
    if peak is None:
        return BlockFold(attention, ffn)
    # an attention branch has no product to divide at run time: its weights take all of it
    attention = max(attention, _needed(peak.attention))
    product = min(max(_needed(max(peak.product, peak.ffn)) - ffn, 0), _MOST_PRODUCT)
    return BlockFold(attention, ffn, product)


def _largest_free_fold(weights: Weights, name: str) -> int:
    sample = weights.get(name).read_rows(_SAMPLE_ROWS)
    deviation = float(np.std(sample, dtype=np.float64))
    if deviation == 0:
        return 0
    return int(min(max(math.floor(math.log2(deviation / _SAFE_DEVIATION)), 0), _MOST))


def check_fp16_range(peaks: Peaks, folds: Mapping[str, Folds]) -> None:
    """Raises `ExportError` where activations that were measured exceed fp16's range and no fold can prevent it.

    What norms give to linears is never divided; what attention's weights would have to give up beyond 2**9 costs fp16
    more precision than bf16 has.
    """
    for component, by_block in peaks.items():
        for block, peak in by_block.items():
            fold = folds[component][block]
            read = max((float(place.peak.max()) for place in _undivided(component, peak)), default=0.0)
            product = max(peak.product, peak.ffn) / 2.0 ** (fold.ffn + fold.product)
            if fold.attention <= _MOST_ATTENTION and max(read, product) * _MARGIN <= FP16_MAX:
                continue
            largest = max(read, peak.attention, peak.product, peak.ffn)
            raise ExportError(
                f"{component}: {block}: activations reach {largest:.3g}, which fp16 (up to {FP16_MAX:.0f}) cannot hold "
                f"and no factor of its weights prevents; use --precision bf16"
            )


def _undivided(component: str, peak: BlockPeak) -> list[ActivationRange]:
    """The ranges of what norms give to linears."""
    names = LAYER_LINEARS[component]
    readers = (f"{names.query}.weight", f"{names.gate}.weight")
    return [peak.places[reader] for reader in readers if reader in peak.places]


def _needed(peak: float) -> int:
    return max(math.ceil(math.log2(max(peak, 1e-30) * HEADROOM / FP16_MAX)), 0)
