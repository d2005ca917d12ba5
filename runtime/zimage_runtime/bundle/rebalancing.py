"""Rebalancing factors: what the weights of an int8 bundle, or of a calibrated int4 one, were multiplied by before they
were quantized.

A block has four *places* where linears read activations. Each place has a factor s > 0 for every channel: the tensor
that makes the channel is divided by s, and the columns of every weight that reads it are multiplied by s, which leaves
the model's results as they are (`zimage_export.weights.rebalance` says why it is done). So, for a published weight W
[out, in] and a norm's published weight w [width], the bundle stores

    W' = diag(rows) · W · diag(columns)      w' = w · columns

where `columns` is s of the place that the linear reads and `rows` is 1 / s of the place that it makes; a norm's
`columns` are 1 / s of the place that it makes. What a linear does not take part in is 1. The stored integers times
their scales are W', times a power of two where the manifest's `folds` have one for the weight. A change of W, such as a
LoRA's, must be transformed in the same way before it is added to W'.

``COMPONENT/rebalancing.safetensors`` holds s of each place, float32 [channels], under the name of the tensor that makes
them: ``layers.7.attention.to_v.weight``. It is a file of its own, listed under ``rebalancing`` in the manifest, so that
the weights keep their hash, and with it the fingerprint, whether the factors are kept or not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from ..arrays import FloatArray
from ..errors import BundleError
from ..model.config import ModelConfig
from ..model.linears import LAYER_LINEARS
from ..model.norms import ATTENTION_NORM, FFN_NORM
from .bundle import Bundle
from .precision import Precision
from .tensors import DType, TensorFile


@dataclass(frozen=True)
class Factors:
    """What a weight [out, in] or a vector is multiplied by before it is stored; None is one everywhere."""

    rows: FloatArray | None = None  # [out]
    columns: FloatArray | None = None  # [in], or a vector's elements

    def apply(self, values: FloatArray, first: int = 0) -> FloatArray:
        """The product, for a vector or for the rows from `first` on."""
        if self.columns is not None:
            values = values * self.columns
        if self.rows is not None:
            values = values * self.rows[first : first + len(values), None]
        return values


@dataclass(frozen=True)
class Place:
    """Activations that linears read. Names are those of a block's tensors, without the block's own."""

    maker: str  # divided by the factors: a norm's weight, or a linear's rows
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


PLACES: Mapping[str, tuple[Place, ...]] = {component: _places(component) for component in LAYER_LINEARS}
"""By component, in the order of a block; the third's first reader is the gate of the fourth."""

ATTENTION_VALUES = 1
"""The index of the place whose channels several heads may share."""


@dataclass(frozen=True)
class SharedHeads:
    """Keys and values that several query heads share: `groups` heads of `width` channels read each of them."""

    groups: int = 1
    width: int = 1

    @classmethod
    def of(cls, config: ModelConfig, component: str) -> Self:
        """Those of a component; the transformer's heads share nothing."""
        if component != "text_encoder":
            return cls()
        text = config.text_encoder
        return cls(text.num_attention_heads // text.num_key_value_heads, text.head_dim)

    def repeat(self, values: FloatArray) -> FloatArray:
        """[shared channels] → [channels of all heads]"""
        if self.groups == 1:
            return values
        return np.repeat(values.reshape(-1, self.width), self.groups, axis=0).reshape(-1)


def block_factors(component: str, chosen: Mapping[str, FloatArray], heads: SharedHeads) -> dict[str, Factors]:
    """The factors of each tensor of a block that takes part, from s of each place by its maker."""
    rows: dict[str, FloatArray] = {}
    columns: dict[str, FloatArray] = {}
    for index, place in enumerate(PLACES[component]):
        factors = chosen[place.maker]
        rows[place.maker] = np.float32(1) / factors
        for reader in place.readers:
            columns[reader] = heads.repeat(factors) if index == ATTENTION_VALUES else factors
    found = {name: Factors(rows.pop(name, None), factors) for name, factors in columns.items()}
    return found | {norm: Factors(columns=factors) for norm, factors in rows.items()}


class RebalancingFactors:
    """The factors of one component of a bundle; all are one where nothing was rebalanced."""

    def __init__(self, bundle: Bundle, component: str) -> None:
        """Raises `BundleError` for a rebalanced bundle without its factors, as earlier versions wrote it."""
        manifest = bundle.manifest
        self._component = component
        self._heads = SharedHeads.of(manifest.config, component)
        path = manifest.rebalancing.get(component)
        self._file = TensorFile(bundle.file(path)) if path else None
        if path is None and manifest.precision is Precision.INT8 and component in PLACES:
            raise BundleError(
                f"{bundle.root}: has no rebalancing factors of its {component}, without which its weights cannot be "
                "changed; export it again"
            )

    def of(self, name: str) -> Factors:
        """The factors of a tensor by its name in the component. Raises `BundleError` where the file lacks them."""
        block, tail = _split(name)
        names = {n for place in PLACES.get(self._component, ()) for n in (place.maker, *place.readers)}
        if self._file is None or tail not in names:
            return Factors()
        chosen = {place.maker: self._read(f"{block}.{place.maker}") for place in PLACES[self._component]}
        return block_factors(self._component, chosen, self._heads)[tail]

    def _read(self, name: str) -> FloatArray:
        assert self._file is not None
        values, dtype = self._file.array(name)
        factors = values.astype(np.float32, copy=False)
        if dtype is not DType.F32 or factors.ndim != 1 or not np.all(np.isfinite(factors) & (factors > 0)):
            raise BundleError(
                f"{self._file.path}: {name} does not contain factors; export or download the bundle again"
            )
        return factors


def _split(name: str) -> tuple[str, str]:
    """``layers.7.attention.to_q.weight`` → ``layers.7``, ``attention.to_q.weight``."""
    stack, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    return f"{stack}.{index}", tail
