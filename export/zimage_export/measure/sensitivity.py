"""What each precision costs each layer: the error that it adds to a linear's output, on the reference's activations.

While the reference runs, every linear of every block is sampled twice: some of the rows that it reads, and some of the
rows of its weight, are rounded as each precision would store them and multiplied again. So an error is counted where
it arises, independent of the bundle's precision. Only sums are kept.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.rebalancing import PLACES
from zimage_runtime.bundle.tensors import DType, to_float32
from zimage_runtime.machine.int8_products import EXACT_LEVELS, SAFE_LEVELS

from ..source.checkpoint import Checkpoint
from ..storage.casts import encode
from ..storage.precision import BLOCK_SIZE, Encoding
from ..storage.quantize import rounded
from ..weights.folding import blocks
from ..weights.rebalance import Rebalancing

_ROWS = 64  # sampled of activations, evenly spread
_OUTPUTS = 128  # sampled of weights, evenly spread
_LOOKS = 2  # samples of each linear: of the first steps, which decide the composition

BF16, INT8, INT8_OF_7, INT4 = "bf16", "int8", "int8 (7-bit)", "int4"
PRECISIONS = (BF16, INT8, INT8_OF_7, INT4)

Layers = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Relative error by component, linear and precision."""


@dataclass
class LayerErrors:
    """Samples the linears of a reference while it runs."""

    _sums: dict[tuple[str, str], list[dict[str, tuple[float, float]]]] = field(default_factory=dict)

    @classmethod
    def watching(cls, reference: Any, checkpoint: Checkpoint) -> "LayerErrors":
        """Hooks every linear that a lower precision quantizes. `reference` is a `ReferencePipeline`."""
        errors, balance = cls(), Rebalancing(checkpoint)
        for component, names in blocks(checkpoint.config).items():
            for block in names:
                module = getattr(reference, component).get_submodule(block)
                for reader in (reader for place in PLACES[component] for reader in place.readers):
                    errors._watch(
                        module.get_submodule(reader.removesuffix(".weight")), component, block, reader, balance
                    )
        return errors

    def _watch(self, linear: nn.Module, component: str, block: str, reader: str, balance: Rebalancing) -> None:
        name = f"{block}.{reader}"
        looks = self._sums.setdefault((component, name.removesuffix(".weight")), [])

        def look(module: Any, inputs: Any) -> None:
            if len(looks) < _LOOKS:
                factors = balance.factors(component, name)
                columns = factors().columns if factors else None
                looks.append(_squares(_some(inputs[0], _ROWS), _some(module.weight, _OUTPUTS), columns))

        linear.register_forward_pre_hook(look)

    def report(self) -> Layers:
        """The relative error of each linear that has run."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for (component, name), looks in self._sums.items():
            if looks:
                found.setdefault(component, {})[name] = {
                    p: math.sqrt(sum(look[p][0] for look in looks) / max(sum(look[p][1] for look in looks), 1e-30))
                    for p in looks[0]
                }
        return found


def _some(tensor: Any, count: int) -> FloatArray:
    """A few rows of a tensor, evenly spread."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))
    return np.asarray(rows[chosen].numpy(), np.float32)


def _squares(x: FloatArray, weights: FloatArray, columns: FloatArray | None) -> dict[str, tuple[float, float]]:
    """By precision: the squared error of x @ weights.T, and its own square."""
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    whole = float(np.sum(exact**2))
    balance = np.ones(x.shape[1], np.float32) if columns is None else columns
    eight = rounded(weights * balance, Encoding.INT8)
    products = {
        BF16: x @ to_float32(encode(weights, DType.BF16, "weights"), DType.BF16).T,
        INT8: _tokens(x / balance, EXACT_LEVELS) @ eight.T,
        INT8_OF_7: _tokens(x / balance, SAFE_LEVELS) @ eight.T,
    }
    if x.shape[1] % BLOCK_SIZE == 0:
        blockwise = _tokens(x.reshape(len(x), -1, BLOCK_SIZE), EXACT_LEVELS).reshape(x.shape)
        products[INT4] = blockwise @ rounded(weights, Encoding.BLOCKS4).T
    return {
        p: (float(np.sum((products[p] - exact) ** 2)), whole) if p in products else (math.nan, 1) for p in PRECISIONS
    }


def _tokens(x: FloatArray, levels: float) -> FloatArray:
    """Activations as quantization leaves them, with a scale for each row of the last axis."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)) / np.float32(levels)
    return np.asarray(np.rint(x / scale) * scale, np.float32)


def summary(layers: Layers) -> dict[str, dict[str, Any]]:
    """What the manifest keeps: by component and precision the median, the worst, and which linear that is."""
    return {
        component: {
            precision: {
                "median": _rounded(statistics.median(errors[precision] for errors in by_name.values())),
                "worst": _rounded(max(errors[precision] for errors in by_name.values())),
                "layer": max(by_name, key=lambda name: by_name[name][precision]),
            }
            for precision in PRECISIONS
            if all(precision in errors for errors in by_name.values())  # int4 does not support some widths
        }
        for component, by_name in layers.items()
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def table(layers: Layers) -> str:
    """Every layer's error in every precision, as text."""
    lines = ["error that a precision adds to each linear's output, on the reference's activations"]
    for component, by_name in layers.items():
        lines.append(f"{component:<40}" + "".join(f"{precision:>14}" for precision in PRECISIONS))
        for name, errors in by_name.items():
            lines.append(f"  {name:<38}" + "".join(f"{errors.get(p, math.nan):>14.2e}" for p in PRECISIONS))
    return "\n".join(lines)
