"""Which layers of an int4 bundle keep 8 bits: those that 4 bits cost most, within a budget.

Each linear's loss is measured: some of its rows are quantized, and their errors are weighted by the range of the
channels that they read. Ranges are estimated from the weights, as in `rebalance`.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.rebalancing import PLACES

from ..errors import ExportError
from ..source.checkpoint import Checkpoint
from ..source.weights import Weights
from ..storage.precision import BLOCK_SIZE, Encoding
from ..storage.quantize import rounded
from .folding import blocks
from .rebalance import Rebalancing, sample_rows

_BUDGET = 0.1  # share of the quantized parameters that keep 8 bits: a tenth makes the weights a tenth larger


def eight_bit_layers(checkpoint: Checkpoint, balance: Rebalancing) -> frozenset[str]:
    """`component/weight` of the linears that keep 8 bits: in each component, the worst tenth of the parameters."""
    return frozenset(
        f"{component}/{name}"
        for component, names in blocks(checkpoint.config).items()
        for name in worst_linears(checkpoint.weights(component), balance, component, names)
    )


def worst_linears(weights: Weights, balance: Rebalancing, component: str, names: Iterable[str]) -> set[str]:
    """The linears of some blocks that 4 bits cost most: a tenth of the parameters."""
    kept: set[str] = set()
    losses = [loss for block in names for loss in _losses(weights, balance, component, block)]
    left = _BUDGET * sum(size for _, _, size in losses)
    for _, name, size in sorted(losses, reverse=True):
        if size <= left:
            left -= size
            kept.add(name)
    return kept


def _losses(weights: Weights, balance: Rebalancing, component: str, block: str) -> Iterator[tuple[float, str, int]]:
    """Relative error of the output, name and parameters of each linear in a block."""
    ranges = balance.ranges(component, block)
    for place in PLACES[component]:
        for reader in place.readers:
            source = weights.get(f"{block}.{reader}")
            if source.shape[1] % BLOCK_SIZE:
                raise ExportError(
                    f"{source.name} has {source.shape[1]} inputs, and int4 needs a multiple of {BLOCK_SIZE}; "
                    "use --precision int8"
                )
            rms = ranges[place.readers[0]].rms
            yield output_loss(sample_rows(source), rms, Encoding.BLOCKS4), source.name, math.prod(source.shape)


def output_loss(rows: FloatArray, rms: FloatArray, encoding: Encoding) -> float:
    """The relative error of the outputs of rows [rows, width], for independent inputs of magnitudes `rms` [width]."""
    error = np.sum(np.square((rounded(rows, encoding) - rows) * rms, dtype=np.float64))
    whole = np.sum(np.square(rows * rms, dtype=np.float64))
    return float(np.sqrt(error / whole)) if whole else 0.0
