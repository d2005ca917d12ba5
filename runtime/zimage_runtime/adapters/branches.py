"""LoRA at run time: the matrices of the branches beside a bundle's linear layers. No weight is changed.

The ranks of several files are joined. A bundle stores diag(rows) W diag(columns) times a power of two: rebalancing
factors in int8, folds in every precision. The change of W is multiplied alike: down by the columns, up by the rest.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..arrays import FloatArray
from ..bundle.bundle import Bundle
from ..bundle.manifest import CPU, Manifest, extended
from ..bundle.rebalancing import Factors, RebalancingFactors
from ..errors import AdapterError, BundleError
from ..model.branches import (
    EXTENDED,
    branch_linears,
    columns_input,
    down_input,
    inner_input,
    outer_input,
    rows_input,
    up_input,
)
from ..model.linears import LAYER_LINEARS
from ..model.programs import Program
from .forms import Hadamard, Kronecker, LowRank
from .reader import Delta, WeightedAdapter

RANK_UNIT = 16
"""Joined ranks are padded to multiples of it."""

_MOST_HADAMARD = 256  # the rank of a LoHa, beyond which it is no longer small
_COMPONENT = "transformer"
_FLOAT = 4


class Product(NamedTuple):
    """A layer's Kronecker product, as extended programs take it."""

    outer: FloatArray  # [a, b]
    inner: FloatArray  # [d, c]
    columns: FloatArray  # [in] or [1]
    rows: FloatArray  # [out] or [1]


@dataclass(frozen=True)
class Branches:
    """The branches' matrices by layer. A layer that is left out has none."""

    matrices: Mapping[str, tuple[FloatArray, FloatArray]] = field(default_factory=dict)
    """Down [rank, in] and up [out, rank]."""
    products: Mapping[str, Product] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        every = [*self.matrices.values(), *self.products.values()]
        return sum(values.nbytes for one in every for values in one)

    def inputs(self, program: Program, manifest: Manifest, least_rank: int = 0) -> dict[str, FloatArray]:
        """The inputs of an extended program. Without a branch, a layer has zeros of the least rank, or nothing."""
        found: dict[str, FloatArray] = {}
        zeros: dict[tuple[int, int], FloatArray] = {}

        def nothing(*shape: int) -> FloatArray:
            if shape not in zeros:  # one for all of a shape
                zeros[shape[0], shape[1]] = np.zeros(shape, np.float32)
            return zeros[shape[0], shape[1]]

        one = np.ones(1, np.float32)
        no_product = Product(nothing(1, 1), nothing(1, 1), one, one)
        for linear in branch_linears(program, manifest.config):
            none = nothing(least_rank, linear.in_width), nothing(linear.out_width, least_rank)
            down, up = self.matrices.get(linear.name, none)
            product = self.products.get(linear.name, no_product)
            found |= {down_input(linear.name): down, up_input(linear.name): up}
            found |= {outer_input(linear.name): product.outer, inner_input(linear.name): product.inner}
            found |= {columns_input(linear.name): product.columns, rows_input(linear.name): product.rows}
        return found


NO_BRANCHES = Branches()

ON_CPU = dict.fromkeys(EXTENDED, CPU)
"""The programs that the CPU needs."""


def check_at_run_time(loras: Sequence[WeightedAdapter], model: str) -> None:
    """Raises `AdapterError` for a file whose changes are no branches, with the line that merges it."""
    products: set[str] = set()
    for lora in loras:
        for delta in lora.adapter.deltas:
            if reason := _why_not(delta, products):
                path = lora.adapter.path
                raise AdapterError(
                    f"{path}: {delta.tensor} {reason}; merge the file into a bundle of its own: "
                    f"zimage-export build {model} OUT --lora {path}:{lora.weight:g}"
                )
            if isinstance(delta.form, Kronecker) and lora.weight:
                products.add(delta.tensor)


def _why_not(delta: Delta, products: Container[str]) -> str | None:
    if delta.target.component != _COMPONENT:
        return "is the text encoder's, whose weights cannot be changed at run time"
    if delta.magnitude is not None:
        return "has new norms (DoRA), which cannot be set at run time"
    if isinstance(delta.form, Hadamard) and delta.form.rank > _MOST_HADAMARD:
        return f"is a LoHa of rank {delta.form.rank}, and at run time {_MOST_HADAMARD} is the most"
    if isinstance(delta.form, Kronecker):
        if delta.tensor in products:
            return "is changed by a LoKr of another file already, and at run time one is the most"
        return None if delta.form.factors() else "is a range of a LoKr's rows that is no product itself"
    if not isinstance(delta.form, LowRank | Hadamard):
        return "is changed as a whole, which cannot be done at run time"
    return None


def branch_bytes(loras: Sequence[WeightedAdapter]) -> int:
    """Bytes of what `make_branches` will make, at most."""
    ranks: dict[str, int] = {}
    widths: dict[str, int] = {}
    products = 0
    for lora in loras:
        for delta in lora.adapter.deltas if lora.weight else ():
            if isinstance(delta.form, LowRank | Hadamard):
                ranks[delta.tensor] = ranks.get(delta.tensor, 0) + delta.form.rank
                widths[delta.tensor] = sum(delta.target.shape)
            elif isinstance(delta.form, Kronecker):
                small = math.prod(delta.form.w1.shape) + math.prod(delta.form.w2.shape)
                products += _FLOAT * (small + sum(delta.target.shape))
    return products + sum(_FLOAT * _padded(rank) * widths[name] for name, rank in ranks.items())


def make_branches(bundle: Bundle, loras: Sequence[WeightedAdapter]) -> Branches:
    """The branches of files that passed `check_at_run_time`; a file of weight 0 is left out.

    Raises `BundleError` for an int8 bundle that does not hold what its weights were multiplied by.
    """
    factors = RebalancingFactors(bundle, _COMPONENT)
    parts: dict[str, list[_Part]] = {}
    products: dict[str, Product] = {}
    for lora in loras:
        for delta in lora.adapter.deltas if lora.weight else ():
            name, scale = delta.target.name, np.float32(delta.scale * lora.weight)
            if isinstance(delta.form, Kronecker):
                both = delta.form.factors()
                assert both is not None
                products[name] = _product(*both, scale, factors.of(f"{name}.weight"), _fold(bundle, name))
                continue
            assert isinstance(delta.form, LowRank | Hadamard)
            up, down = delta.form.factors()
            parts.setdefault(name, []).append(_Part(down, up, scale))
    matrices = {name: _joined(some, factors.of(f"{name}.weight"), _fold(bundle, name)) for name, some in parts.items()}
    return Branches(matrices, products)


def _product(w1: FloatArray, w2: FloatArray, scale: np.float32, factors: Factors, power: float) -> Product:
    one = np.ones(1, np.float32)
    columns = one if factors.columns is None else factors.columns
    rows = one if factors.rows is None else factors.rows
    return Product(w1 * (scale * np.float32(power)), np.ascontiguousarray(w2.T), columns, rows)


class _Part(NamedTuple):
    """One file's change of a layer."""

    down: FloatArray
    up: FloatArray
    scale: np.float32


def _joined(parts: Sequence[_Part], factors: Factors, power: float) -> tuple[FloatArray, FloatArray]:
    rank = sum(len(part.down) for part in parts)
    joined_down = np.empty((_padded(rank), parts[0].down.shape[1]), np.float32)
    joined_up = np.empty((len(parts[0].up), _padded(rank)), np.float32)
    joined_down[rank:], joined_up[:, rank:] = 0, 0
    first = 0
    for down, up, scale in parts:
        joined_down[first : first + len(down)] = down
        np.multiply(up, scale, out=joined_up[:, first : first + len(down)])
        first += len(down)
    if factors.columns is not None:
        joined_down *= factors.columns
    if factors.rows is not None:
        joined_up *= factors.rows[:, None]
    if power != 1:
        joined_up *= np.float32(power)
    return joined_down, joined_up


def _padded(rank: int) -> int:
    return -(-rank // RANK_UNIT) * RANK_UNIT


def _fold(bundle: Bundle, linear: str) -> float:
    """The power of two that a layer's stored weight was multiplied by (`zimage_export.storage.folds`)."""
    block, _, tail = linear.partition(".")
    index, _, tail = tail.partition(".")
    folds = bundle.manifest.folds.get(_COMPONENT, {}).get(f"{block}.{index}", {})
    names = LAYER_LINEARS[_COMPONENT]
    kind = {names.out: "attention", names.up: "ffn"}.get(tail)
    return float(2.0 ** -folds.get(kind, 0)) if kind else 1.0


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
