"""Moving magnitudes between activations and weights before both are quantized, without changing any result.

A token's activations share one scale, so a channel of fifty times the others' magnitude leaves them six levels.

Dividing a channel by s where it is made, and multiplying the column of every weight that reads it by s, is exact and
costs nothing. What makes a channel is a norm's weight, a row of `to_v` (attention averages its rows and mixes no
channels), or a row of `w3` (a factor of the SwiGLU product). The norms' weights reach the blocks through the
modulation table, which contains them times 1 + scale, so dividing the stored weight divides the table.

How far to go (`s = a^α / w^(1-α)`, SmoothQuant, arXiv 2211.10438) is chosen for each place by the error that
quantizing its activations and its weights is expected to add to the layers' outputs; leaving it alone is among the
choices. `a` is the range of each channel: measured by `calibrate`, or estimated from the weights alone.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.rebalancing import ATTENTION_VALUES, PLACES, Factors, SharedHeads, block_factors
from zimage_runtime.bundle.tensors import DType

from ..source.tensors import TensorSource, check_finite
from ..source.weights import Weights
from ..storage.feedback import Moments
from ..storage.folds import block_of
from ..storage.stored import LazyFactors, StoredTensor, row_chunks
from .folding import ActivationRange, Peaks

_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SAMPLE_ROWS = 192  # of each weight that reads a channel
_PEAK = 4.0  # the largest of a few thousand normal values, over their standard deviation
_LEAST = 1e-4  # of the median: a channel that is always zero, or that no weight reads, gets no unbounded factor
_LEVELS = 127.0
_FAR = 4.0


Ranges = Mapping[str, Mapping[str, Mapping[str, ActivationRange]]]
"""By component, block and place."""


def measured_ranges(peaks: Peaks | None) -> Ranges:
    """The activation ranges that calibration measured; empty without calibration."""
    return {
        component: {block: peak.places for block, peak in by_block.items()}
        for component, by_block in (peaks or {}).items()
    }


def measured_moments(peaks: Peaks | None, component: str, name: str) -> Moments | None:
    """What calibration measured of the inputs of a linear, by its weight's name; None without it."""
    block = block_of(name)
    found = (peaks or {}).get(component, {}).get(block)
    tail = name.removeprefix(f"{block}.")
    place = next((place for place in PLACES.get(component, ()) if tail in place.readers), None)
    if found is None or place is None or place.readers[0] not in found.places:
        return None
    return found.places[place.readers[0]].moments


class Rebalanced(Protocol):
    """What has blocks to rebalance: a checkpoint, or a ControlNet."""

    def weights(self, component: str) -> Weights:
        """The tensors of a component."""

    def heads(self, component: str) -> SharedHeads:
        """Which heads of a component share keys and values."""


class Rebalancing:
    """The factors of every tensor of a checkpoint. A block is examined when its first tensor is requested."""

    def __init__(
        self,
        checkpoint: Rebalanced,
        ranges: Ranges | None = None,
        carried: Collection[str] = frozenset(),
        *,
        only_far: bool = False,
    ) -> None:
        """`ranges` are those that `calibrate` measured; without them, ranges are estimated from the weights.

        `carried` are weights, as `component/name`, whose integers nothing may change: their blocks are left alone.
        With `only_far`, so are the channels whose factor is within four times the median's (see `only_far_ones`).
        """
        self._left_alone = {f"{name.partition('/')[0]}/{block_of(name.partition('/')[2])}" for name in carried}
        self._checkpoint = checkpoint
        self._measured = ranges or {}
        self._only_far = only_far
        self._chosen = functools.cache(self._choose_block)
        self._block = functools.cache(self._factors_of_block)

    def factors(self, component: str, name: str) -> LazyFactors | None:
        """The factors of a tensor; None for one that takes no part."""
        block = block_of(name)
        tail = name.removeprefix(f"{block}.")
        names = {n for place in PLACES.get(component, ()) for n in (place.maker, *place.readers)}
        if tail not in names:
            return None
        return lambda: self._block(component, block)[tail]

    def ranges(self, component: str, block: str) -> dict[str, ActivationRange]:
        """The activation ranges of each place of a block, by its first reader."""
        weights, heads = self._checkpoint.weights(component), self._checkpoint.heads(component)
        measured = self._measured.get(component, {}).get(block, {})
        places = [place.readers[0] for place in PLACES[component]]
        if all(place in measured for place in places):
            return dict(measured)
        return {**_estimate(weights, component, block, heads), **measured}

    def stored(self, component: str, names: Iterable[str]) -> list[StoredTensor]:
        """The factors of every place of a component's blocks, as the bundle keeps them (see `bundle.rebalancing`)."""
        weights = self._checkpoint.weights(component)

        def tensor(block: str, maker: str) -> StoredTensor:
            name = f"{block}.{maker}"
            width = weights.get(name).shape[0]
            return StoredTensor(name, DType.F32, (width,), lambda: iter([self._chosen(component, block)[maker]]))

        return [tensor(block, place.maker) for block in names for place in PLACES[component]]

    def _choose_block(self, component: str, block: str) -> dict[str, FloatArray]:
        """The factors of each place of a block, by its maker."""
        weights = self._checkpoint.weights(component)
        if f"{component}/{block}" in self._left_alone:
            widths = {place.maker: weights.get(f"{block}.{place.maker}").shape[0] for place in PLACES[component]}
            return {maker: np.ones(width, np.float32) for maker, width in widths.items()}
        heads = self._checkpoint.heads(component)
        ranges = self.ranges(component, block)
        chosen: dict[str, FloatArray] = {}
        for index, place in enumerate(PLACES[component]):
            samples = [sample_rows(weights.get(f"{block}.{reader}")) for reader in place.readers]
            shared = heads if index == ATTENTION_VALUES else SharedHeads()
            factors = choose(_gather(ranges[place.readers[0]], shared), _stack(samples, shared))
            chosen[place.maker] = only_far_ones(factors) if self._only_far else factors
        return chosen

    def _factors_of_block(self, component: str, block: str) -> dict[str, Factors]:
        heads = self._checkpoint.heads(component)
        return block_factors(component, self._chosen(component, block), heads)


def choose(activations: ActivationRange, readers: Sequence[FloatArray]) -> FloatArray:
    """What to multiply the readers' columns by, [width]: the choice of least expected error.

    `readers` are rows of each weight that reads the channels.
    """
    rows = np.concatenate(readers).astype(np.float64)
    rms, peak = activations.rms.astype(np.float64), activations.peak.astype(np.float64)
    energy = np.mean(rows**2, axis=0)
    most = np.abs(rows).max(axis=0)
    best, least = np.ones_like(rms), _expected_error(rms, peak, energy, rows)
    for strength in _STRENGTHS:
        factors = _floored(peak) ** strength / _floored(most) ** (1 - strength)
        factors /= np.exp(np.mean(np.log(factors)))
        error = _expected_error(rms / factors, peak / factors, energy * factors**2, rows * factors)
        if error < least:
            best, least = factors, error
    return best.astype(np.float32)


def only_far_ones(factors: FloatArray) -> FloatArray:
    """The factors that are far from their median, over it; 1 for all others.

    Where few values share a scale, as in int4, channels that are nearly alike cost each other little, and multiplying
    columns by unlike factors costs their blocks of weights more.
    """
    relative = factors / np.median(factors)
    far = (relative > _FAR) | (relative < 1 / _FAR)
    return np.where(far, relative, np.float32(1)).astype(np.float32)


def _expected_error(
    rms: NDArray[np.float64], peak: NDArray[np.float64], energy: NDArray[np.float64], rows: NDArray[np.float64]
) -> float:
    """The mean square that quantization adds to an output: steps of the activations, and steps of the weights."""
    of_activations = float((peak.max() / _LEVELS) ** 2 * energy.sum())
    of_weights = float(np.mean((np.abs(rows).max(axis=1) / _LEVELS) ** 2) * np.sum(rms**2))
    return (of_activations + of_weights) / 12


def _floored(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(values, max(float(np.median(values)) * _LEAST, 1e-30))


def _gather(activations: ActivationRange, heads: SharedHeads) -> ActivationRange:
    """Of all heads → of the channels that they share: the largest range among the heads that share."""
    if heads.groups == 1:
        return activations
    shape = (-1, heads.groups, heads.width)
    return ActivationRange(
        np.sqrt(np.square(activations.rms).reshape(shape).mean(axis=1)).reshape(-1),
        activations.peak.reshape(shape).max(axis=1).reshape(-1),
    )


def _stack(samples: Sequence[FloatArray], heads: SharedHeads) -> list[FloatArray]:
    """Columns of all heads → of the channels that they share, with more rows instead."""
    if heads.groups == 1:
        return list(samples)
    split = [s.reshape(len(s), -1, heads.groups, heads.width) for s in samples]
    return [s[:, :, group].reshape(len(s), -1) for s in split for group in range(heads.groups)]


def _estimate(weights: Weights, component: str, block: str, heads: SharedHeads) -> dict[str, ActivationRange]:
    """Ranges from the weights alone, by place.

    After a norm, a channel's magnitude is its weight's; after a linear, with independent inputs, its row's norm.
    """
    attention, value, ffn, product = PLACES[component]
    found = {}
    entering = _magnitudes(weights.get(f"{block}.{attention.maker}"))
    found[attention.readers[0]] = _normal(entering)
    # attention averages; what it leaves of an average over many tokens is the same for all channels
    rms = _row_rms(weights.get(f"{block}.{value.maker}"), entering)
    found[value.readers[0]] = _normal(heads.repeat(rms))
    entering = _magnitudes(weights.get(f"{block}.{ffn.maker}"))
    found[ffn.readers[0]] = _normal(entering)
    gate = _silu_rms(_row_rms(weights.get(f"{block}.{ffn.readers[0]}"), entering))
    found[product.readers[0]] = _normal(gate * _row_rms(weights.get(f"{block}.{product.maker}"), entering))
    return found


def _magnitudes(norm: TensorSource) -> FloatArray:
    """Of a norm's weight [width]."""
    return np.abs(check_finite(norm.read(), norm.name, norm.path))


def _normal(rms: FloatArray) -> ActivationRange:
    return ActivationRange(rms, rms * np.float32(_PEAK))


def _row_rms(source: TensorSource, entering: FloatArray) -> FloatArray:
    """[out]: the root mean square of each output, for independent inputs of these."""
    squares = np.square(entering)
    rms: FloatArray = np.sqrt(np.concatenate([np.square(rows) @ squares for _, rows in row_chunks(source)]))
    return check_finite(rms, source.name, source.path)


def _silu_rms(deviation: FloatArray) -> FloatArray:
    """The root mean square of silu(z) for normal z of these deviations, by Gauss-Hermite quadrature."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(21)
    z = deviation.astype(np.float64)[:, None] * nodes
    silu = z / (1 + np.exp(-np.clip(z, -500, 500)))
    rms: FloatArray = np.sqrt(silu**2 @ node_weights / node_weights.sum()).astype(np.float32)
    return rms


def sample_rows(source: TensorSource) -> FloatArray:
    """Some of a weight's rows, evenly spread."""
    count = source.shape[0]
    return source.picked_rows(np.unique(np.linspace(0, count - 1, min(_SAMPLE_ROWS, count)).astype(np.int64)))
