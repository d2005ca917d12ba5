"""Moving magnitudes between activations and weights before both are quantized, without changing any result.

A token's activations share one scale, so a channel that is fifty times as loud as the rest leaves the rest six levels.
Dividing a channel by s where it is made, and multiplying the column of every weight that reads it by s, is exact and
free: what makes a channel is a norm's weight, a row of `to_v` (attention averages its rows and mixes no channels), or
a row of `w3` (which is multiplied in the SwiGLU product). The norms' weights reach the blocks through the modulation
table, which holds them times 1 + scale; so dividing the stored weight divides the table.

How far to go (`s = a^α / w^(1-α)`, SmoothQuant, arXiv 2211.10438) is chosen for each place by the error that
quantizing its activations and its weights is expected to add to the layers' outputs; not at all is among the choices.
`a` is how loud each channel is: measured by `calibrate`, or told by the weights alone.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.tensors import to_float32
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.linears import LAYER_LINEARS
from zimage_runtime.model.norms import ATTENTION_NORM, FFN_NORM

from ..source.checkpoint import Checkpoint, TensorSource, Weights
from ..storage.folds import block_of
from ..storage.stored import Factors, LazyFactors, row_chunks
from .folding import ActivationRange, Peaks

_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SAMPLE_ROWS = 192  # of each weight that reads a channel
_PEAK = 4.0  # the largest of a few thousand normal values, over their standard deviation
_LEAST = 1e-4  # of the median: a channel that is silent, or that nobody reads, is not blown up without bound
_LEVELS = 127.0


Ranges = Mapping[str, Mapping[str, Mapping[str, ActivationRange]]]
"""By component, block and place."""


@dataclass(frozen=True)
class Place:
    """Activations that linears read: named as the first of them, made by a norm's weight or another linear's rows."""

    maker: str  # divided: a norm's weight, or the rows of a linear's
    readers: tuple[str, ...]  # multiplied: the columns of these linears


def _places(component: str) -> tuple[Place, ...]:
    linears = LAYER_LINEARS[component]
    attention, ffn = ATTENTION_NORM[component], FFN_NORM[component]
    readers = {
        attention: (linears.query, linears.key, linears.value),
        linears.value: (linears.out,),
        ffn: (linears.gate, linears.up),
        linears.up: (linears.down,),
    }
    return tuple(Place(f"{maker}.weight", tuple(f"{n}.weight" for n in names)) for maker, names in readers.items())


PLACES = {component: _places(component) for component in LAYER_LINEARS}
"""In the order of a block; the third's first reader is the gate of the fourth."""


def loudness(peaks: Peaks | None) -> Ranges:
    """What calibration saw of each place; nothing where it did not run."""
    return {
        component: {block: peak.places for block, peak in by_block.items()}
        for component, by_block in (peaks or {}).items()
    }


class Rebalancing:
    """The factors of every tensor of a checkpoint. A block is looked at when its first tensor is asked for."""

    def __init__(self, checkpoint: Checkpoint, ranges: Ranges | None = None) -> None:
        """With `ranges`, measured by `calibrate`; otherwise loudness is told from the weights."""
        self._checkpoint = checkpoint
        self._ranges = ranges or {}
        self._block = functools.cache(self._factors_of_block)

    def factors(self, component: str, name: str) -> LazyFactors | None:
        """The factors of a tensor; None for one that takes no part."""
        block = block_of(name)
        tail = name.removeprefix(f"{block}.")
        names = {n for place in PLACES.get(component, ()) for n in (place.maker, *place.readers)}
        if tail not in names:
            return None
        return lambda: self._block(component, block)[tail]

    def loudness(self, component: str, block: str) -> dict[str, ActivationRange]:
        """How loud the activations of each place of a block are, by its first reader."""
        weights, heads = self._checkpoint.weights(component), _Heads.of(self._checkpoint.config, component)
        measured = self._ranges.get(component, {}).get(block, {})
        places = [place.readers[0] for place in PLACES[component]]
        if all(place in measured for place in places):
            return dict(measured)
        return {**_tell(weights, component, block, heads), **measured}

    def _factors_of_block(self, component: str, block: str) -> dict[str, Factors]:
        weights = self._checkpoint.weights(component)
        spread = _Heads.of(self._checkpoint.config, component)
        told = self.loudness(component, block)
        columns: dict[str, FloatArray] = {}
        rows: dict[str, FloatArray] = {}
        for index, place in enumerate(PLACES[component]):
            loudness = told[place.readers[0]]
            samples = [sample_rows(weights.get(f"{block}.{reader}")) for reader in place.readers]
            shared = spread if index == 1 else _NO_HEADS  # values that several heads share are scaled alike
            factors = choose(shared.gather(loudness), shared.stack(samples))
            for reader in place.readers:
                columns[reader] = shared.repeat(factors)
            rows[place.maker] = np.float32(1) / factors
        found = {name: Factors(rows.get(name), factor) for name, factor in columns.items()}
        for place in PLACES[component]:
            if place.maker not in columns:  # a norm's weight is a vector
                found[place.maker] = Factors(columns=rows[place.maker])
        return found


def choose(loudness: ActivationRange, readers: Sequence[FloatArray]) -> FloatArray:
    """What to multiply the readers' columns by, [width]: the choice of least expected error.

    `readers` are rows of each weight that reads the channels.
    """
    rows = np.concatenate(readers).astype(np.float64)
    rms, peak = loudness.rms.astype(np.float64), loudness.peak.astype(np.float64)
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


def _expected_error(
    rms: NDArray[np.float64], peak: NDArray[np.float64], energy: NDArray[np.float64], rows: NDArray[np.float64]
) -> float:
    """The mean square that quantization adds to an output: steps of the activations, and steps of the weights."""
    of_activations = float((peak.max() / _LEVELS) ** 2 * energy.sum())
    of_weights = float(np.mean((np.abs(rows).max(axis=1) / _LEVELS) ** 2) * np.sum(rms**2))
    return (of_activations + of_weights) / 12


def _floored(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(values, max(float(np.median(values)) * _LEAST, 1e-30))


@dataclass(frozen=True)
class _Heads:
    """Keys and values that several query heads share: `groups` heads of `width` channels read each of theirs."""

    groups: int
    width: int

    @classmethod
    def of(cls, config: ModelConfig, component: str) -> "_Heads":
        if component == "transformer":
            return _NO_HEADS
        text = config.text_encoder
        return cls(text.num_attention_heads // text.num_key_value_heads, text.head_dim)

    def repeat(self, values: FloatArray) -> FloatArray:
        """[shared channels] → [channels of all heads]"""
        if self.groups == 1:
            return values
        return np.repeat(values.reshape(-1, self.width), self.groups, axis=0).reshape(-1)

    def gather(self, loudness: ActivationRange) -> ActivationRange:
        """Of all heads → of the shared channels: the loudest of those that share."""
        if self.groups == 1:
            return loudness
        shape = (-1, self.groups, self.width)
        return ActivationRange(
            np.sqrt(np.square(loudness.rms).reshape(shape).mean(axis=1)).reshape(-1),
            loudness.peak.reshape(shape).max(axis=1).reshape(-1),
        )

    def stack(self, samples: Sequence[FloatArray]) -> list[FloatArray]:
        """Columns of all heads → of the shared channels, with more rows instead."""
        if self.groups == 1:
            return list(samples)
        split = [s.reshape(len(s), -1, self.groups, self.width) for s in samples]
        return [s[:, :, group].reshape(len(s), -1) for s in split for group in range(self.groups)]


_NO_HEADS = _Heads(1, 1)


def _tell(weights: Weights, component: str, block: str, heads: _Heads) -> dict[str, ActivationRange]:
    """Ranges from the weights alone, by place: behind a norm, channels are as loud as its weight says, and a linear
    of inputs that know nothing of each other is as loud as its row."""
    attention, value, ffn, product = PLACES[component]
    found = {}
    entering = np.abs(weights.get(f"{block}.{attention.maker}").read())
    found[attention.readers[0]] = _normal(entering)
    # attention averages; what it leaves of an average over many tokens is the same for all channels
    rms = _row_rms(weights.get(f"{block}.{value.maker}"), entering)
    found[value.readers[0]] = _normal(heads.repeat(rms))
    entering = np.abs(weights.get(f"{block}.{ffn.maker}").read())
    found[ffn.readers[0]] = _normal(entering)
    gate = _silu_rms(_row_rms(weights.get(f"{block}.{ffn.readers[0]}"), entering))
    found[product.readers[0]] = _normal(gate * _row_rms(weights.get(f"{block}.{product.maker}"), entering))
    return found


def _normal(rms: FloatArray) -> ActivationRange:
    return ActivationRange(rms, rms * np.float32(_PEAK))


def _row_rms(source: TensorSource, entering: FloatArray) -> FloatArray:
    """[out]: the root mean square of each output, for independent inputs of these."""
    squares = np.square(entering)
    rms: FloatArray = np.sqrt(np.concatenate([np.square(rows) @ squares for _, rows in row_chunks(source)]))
    return rms


def _silu_rms(deviation: FloatArray) -> FloatArray:
    """The root mean square of silu(z) for normal z of these deviations, by Gauss-Hermite quadrature."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(21)
    z = deviation.astype(np.float64)[:, None] * nodes
    silu = z / (1 + np.exp(-np.clip(z, -500, 500)))
    rms: FloatArray = np.sqrt(silu**2 @ node_weights / node_weights.sum()).astype(np.float32)
    return rms


def sample_rows(source: TensorSource) -> FloatArray:
    """Some of a weight's rows, evenly spread."""
    table = np.memmap(source.path, dtype=source.dtype.storage, mode="r", offset=source.entry.offset, shape=source.shape)
    chosen = np.unique(np.linspace(0, len(table) - 1, min(_SAMPLE_ROWS, len(table))).astype(np.int64))
    return to_float32(np.asarray(table[chosen]), source.dtype)
