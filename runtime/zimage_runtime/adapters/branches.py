"""LoRA at run time: the matrices of the branches beside a bundle's linear layers. No weight is changed.

The ranks of several files are joined. A bundle stores diag(rows) W diag(columns) times a power of two: rebalancing
factors in int8, folds in every precision. The change of W is multiplied alike: down by the columns, up by the rest.
DoRA's factors multiply the layer's own output and the changes of all files up to the one that has them (see `dora`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..arrays import FloatArray
from ..bundle.bundle import Bundle
from ..bundle.manifest import CPU, Manifest, extended
from ..bundle.rebalancing import Factors, RebalancingFactors
from ..bundle.stored_weights import PublishedRows, fold_of
from ..errors import AdapterError, BundleError
from ..model.branches import (
    ALL_EXTENDED,
    branch_linears,
    columns_input,
    down_input,
    factor_input,
    inner_input,
    outer_input,
    rows_input,
    up_input,
)
from ..model.programs import Program
from .dora import channel_factors
from .forms import Hadamard, Kronecker, LowRank
from .kronecker import ProductSum, joined, joined_sizes
from .reader import Delta, WeightedAdapter

RANK_UNIT = 16
"""Joined ranks are padded to multiples of it."""

_MOST_HADAMARD = 256  # the rank of a LoHa, beyond which it is no longer small
_COMPONENT = "transformer"
_FLOAT = 4
_ONE = np.ones(1, np.float32)


class Products(NamedTuple):
    """A layer's Kronecker products, as extended programs take them."""

    outer: FloatArray  # [a, b, products]
    inner: FloatArray  # [d, products, c]
    columns: FloatArray  # [in]
    rows: FloatArray  # [out]


_NO_PRODUCTS = Products(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32), _ONE, _ONE)


@dataclass(frozen=True)
class Branches:
    """The branches' matrices by layer. A layer that is left out has none."""

    matrices: Mapping[str, tuple[FloatArray, FloatArray]] = field(default_factory=dict)
    """Down [rank, in] and up [out, rank]."""
    products: Mapping[str, Products] = field(default_factory=dict)
    factors: Mapping[str, FloatArray] = field(default_factory=dict)
    """DoRA's, [out]."""

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        every = [*self.matrices.values(), *self.products.values()]
        return sum(values.nbytes for one in (*every, self.factors.values()) for values in one)

    def inputs(self, program: Program, manifest: Manifest, least_rank: int = 0) -> dict[str, FloatArray]:
        """The inputs of an extended program. Without a branch, a layer has zeros of the least rank, or nothing."""
        found: dict[str, FloatArray] = {}
        zeros: dict[tuple[int, int], FloatArray] = {}

        def nothing(*shape: int) -> FloatArray:
            if shape not in zeros:  # one for all of a shape
                zeros[shape[0], shape[1]] = np.zeros(shape, np.float32)
            return zeros[shape[0], shape[1]]

        for linear in branch_linears(program, manifest.config):
            name = linear.name
            products = self.products.get(name, _NO_PRODUCTS)
            channels = linear.out_width if name in self.products else 1
            none = nothing(least_rank, linear.in_width), nothing(channels, least_rank)
            down, up = self.matrices.get(name, none)
            found |= {down_input(name): down, up_input(name): up, factor_input(name): self.factors.get(name, _ONE)}
            found |= {outer_input(name): products.outer, inner_input(name): products.inner}
            found |= {columns_input(name): products.columns, rows_input(name): products.rows}
        return found


NO_BRANCHES = Branches()

ON_CPU = dict.fromkeys(ALL_EXTENDED, CPU)
"""The programs that the CPU needs."""


def check_at_run_time(loras: Sequence[WeightedAdapter], model: str) -> None:
    """Raises `AdapterError` for a file whose changes are no branches, with the line that merges it."""
    for lora in loras:
        for delta in lora.adapter.deltas:
            if reason := _why_not(delta):
                path = lora.adapter.path
                raise AdapterError(
                    f"{path}: {delta.tensor} {reason}; merge the file into a bundle of its own: "
                    f"zimage-export build {model} OUT --lora {path}:{lora.weight:g}"
                )


def _why_not(delta: Delta) -> str | None:
    if delta.target.component != _COMPONENT:
        return "is the text encoder's, whose weights cannot be changed at run time"
    if delta.magnitude is not None and not delta.magnitude_of_rows:
        return "has new norms of input channels (DoRA), and at run time only output channels can be given some"
    if isinstance(delta.form, Hadamard) and delta.form.rank > _MOST_HADAMARD:
        return f"is a LoHa of rank {delta.form.rank}, and at run time {_MOST_HADAMARD} is the most"
    if not isinstance(delta.form, LowRank | Hadamard | Kronecker):
        return "is changed as a whole, which cannot be done at run time"
    return None


@dataclass(frozen=True)
class _Change:
    """What one file does to a layer."""

    delta: Delta
    weight: float

    @property
    def scale(self) -> float:
        return self.delta.scale * self.weight


@dataclass(frozen=True)
class _Layer:
    """What files do to a layer, in their order."""

    changes: tuple[_Change, ...]

    @property
    def rank(self) -> int:
        """Of the changes that are low-rank, together and padded."""
        forms = [change.delta.form for change in self.changes]
        rank = sum(form.rank for form in forms if isinstance(form, LowRank | Hadamard))
        return -(-rank // RANK_UNIT) * RANK_UNIT

    @property
    def products(self) -> list[Kronecker]:
        """The changes that are Kronecker products."""
        return [change.delta.form for change in self.changes if isinstance(change.delta.form, Kronecker)]

    @property
    def decomposed(self) -> bool:
        """Whether a file sets norms: DoRA."""
        return any(change.delta.magnitude is not None for change in self.changes)

    @property
    def parted(self) -> bool:
        """Whether a Kronecker product has other factors than the next: a DoRA's are between them."""
        count, found = 0, set()
        for change in reversed(self.changes):
            count += change.delta.magnitude is not None
            if isinstance(change.delta.form, Kronecker):
                found.add(count)
        return len(found) > 1

    @property
    def nbytes(self) -> int:
        """Of all that `make_branches` makes for it."""
        out, width = self.changes[0].delta.target.shape
        elements = self.rank * (out + width) + out * self.decomposed
        if self.products:
            sizes = joined_sizes([form.sizes for form in self.products], whole=self.parted)
            elements += sizes.elements + out + width
        return _FLOAT * elements


def _layers(loras: Sequence[WeightedAdapter]) -> dict[str, _Layer]:
    """What files do to each layer that one of them changes; a file of weight 0 is left out."""
    found: dict[str, list[_Change]] = {}
    for lora in loras:
        for delta in lora.adapter.deltas if lora.weight else ():
            found.setdefault(delta.target.name, []).append(_Change(delta, lora.weight))
    return {name: _Layer(tuple(changes)) for name, changes in found.items()}


@dataclass(frozen=True)
class BranchSizes:
    """What `make_branches` will make of files that passed `check_at_run_time`."""

    nbytes: int
    rank: int  # the largest of a layer's
    products: bool  # whether there are LoKr

    @classmethod
    def of(cls, loras: Sequence[WeightedAdapter]) -> "BranchSizes":
        """Of files; those of weight 0 are left out."""
        layers = _layers(loras).values()
        return cls(
            sum(layer.nbytes for layer in layers),
            max((layer.rank for layer in layers), default=0),
            any(layer.products for layer in layers),
        )


def make_branches(bundle: Bundle, loras: Sequence[WeightedAdapter]) -> Branches:
    """The branches of files that passed `check_at_run_time`; a file of weight 0 is left out.

    DoRA reads the weights of the layers that it changes. Raises `BundleError` for an int8 bundle that does not hold
    what its weights were multiplied by.
    """
    rebalancing, published = RebalancingFactors(bundle, _COMPONENT), PublishedRows(bundle, _COMPONENT)
    matrices: dict[str, tuple[FloatArray, FloatArray]] = {}
    products: dict[str, Products] = {}
    factors: dict[str, FloatArray] = {}
    for name, layer in _layers(loras).items():
        stored, power = rebalancing.of(f"{name}.weight"), np.float32(fold_of(bundle, _COMPONENT, name))
        parts = _parts(layer, published)
        if layer.decomposed:
            factors[name] = next(part.factors for part in parts if part.factors is not None)
        if layer.rank:
            matrices[name] = _joined(parts, layer.rank, stored, power)
        if layer.products:
            products[name] = _products(parts, layer, stored, power)
    return Branches(matrices, products, factors)


class _Part(NamedTuple):
    """A file's change of a layer, and what its output channels are multiplied by, [out]."""

    change: _Change
    factors: FloatArray | None


def _parts(layer: _Layer, published: PublishedRows) -> list[_Part]:
    """The changes in their order: the first one's factors are all of the layer's."""
    factors: FloatArray | None = None
    found: list[_Part] = []
    for change in reversed(layer.changes):
        if change.delta.magnitude is not None:
            more = channel_factors(change.delta, change.scale, published)
            factors = more if factors is None else factors * more
        found.insert(0, _Part(change, factors))
    return found


def _joined(parts: Sequence[_Part], padded: int, stored: Factors, power: np.float32) -> tuple[FloatArray, FloatArray]:
    out, width = parts[0].change.delta.target.shape
    joined_down, joined_up = np.empty((padded, width), np.float32), np.empty((out, padded), np.float32)
    first = 0
    for change, factors in parts:
        if not isinstance(change.delta.form, LowRank | Hadamard):
            continue
        up, down = change.delta.form.factors()
        columns = slice(first, first + len(down))
        joined_down[columns] = down
        np.multiply(up, np.float32(change.scale), out=joined_up[:, columns])
        if factors is not None:
            joined_up[:, columns] *= factors[:, None]
        first += len(down)
    joined_down[first:], joined_up[:, first:] = 0, 0
    if stored.columns is not None:
        joined_down *= stored.columns
    if stored.rows is not None:
        joined_up *= stored.rows[:, None]
    if power != 1:
        joined_up *= power
    return joined_down, joined_up


def _products(parts: Sequence[_Part], layer: _Layer, stored: Factors, power: np.float32) -> Products:
    out, width = layer.changes[0].delta.target.shape
    rows = np.full(out, power) if stored.rows is None else stored.rows * power
    sums: list[tuple[ProductSum, FloatArray | None]] = []
    for change, factors in parts:
        if isinstance(change.delta.form, Kronecker):
            one = change.delta.form.products()
            sums.append((ProductSum(one.outer * np.float32(change.scale), one.inner), factors))
    if not layer.parted and sums[0][1] is not None:  # one for all
        rows = rows * sums[0][1]
        sums = [(one, None) for one, _ in sums]
    total = joined(sums, joined_sizes([form.sizes for form in layer.products], whole=layer.parted))
    return Products(
        np.ascontiguousarray(total.outer.transpose(1, 2, 0)),
        np.ascontiguousarray(total.inner.transpose(2, 0, 1)),
        np.ones(width, np.float32) if stored.columns is None else stored.columns,
        rows,
    )


def check_extended(bundle: Bundle, names: Mapping[Program, str], option: str = "--lora") -> None:
    """Raises `BundleError` where a bundle lacks programs that take LoRA and hints, or has only some of them, of an
    earlier form. `names` are those of what they extend."""
    manifest = bundle.manifest
    if any(manifest.record(program, extended(name)) is None for program, name in names.items()):
        what = {"--lora": "LoRA", "--control": "a ControlNet's hints"}[option]
        raise BundleError(
            f"{bundle.root}: has no programs that take {what}, or older ones; "
            f"`zimage-export programs {bundle.root} {option}` adds them"
        )
