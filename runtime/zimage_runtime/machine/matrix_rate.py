"""How fast this processor multiplies matrices with ONNX Runtime: what a step's time is estimated from.

A benchmark wants the ceiling: large products, the best of several (`float_rate`, `integer_rate`). A plan wants an
answer at once: smaller products, for a fraction of a second (`quick_rate`).
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cores import thread_count
from .tiny_onnx import Element, Node, Value, onnx_model

_SIDE = 2048  # rows, columns and depth: as large as a step's products, and quick
_REPEATS = 5

_QUICK_SIDE = 768  # large enough to keep 16 cores busy, and 0.1 s for the slowest core that there is
_QUICK_SECONDS = 0.05

Clock = Callable[[], float]


def float_rate(side: int = _SIDE, repeats: int = _REPEATS, clock: Clock = time.perf_counter) -> float:
    """Operations per second of a float32 MatMul, the best of `repeats`."""
    return _best(_float_product(side), repeats, clock)


def integer_rate(side: int = _SIDE, repeats: int = _REPEATS, clock: Clock = time.perf_counter) -> float:
    """Operations per second of MatMulInteger with unsigned activations and signed weights, as in an int8 bundle."""
    return _best(_integer_product(side), repeats, clock)


@cache
def quick_rate(integer: bool) -> float:
    """Operations per second, measured once per process in well under 0.3 s: good for estimates, not for benchmarks."""
    product = _integer_product(_QUICK_SIDE) if integer else _float_product(_QUICK_SIDE)
    product.run()  # the first one wakes the threads
    best, end = float("inf"), time.perf_counter() + _QUICK_SECONDS
    while (start := time.perf_counter()) < end:
        product.run()
        best = min(best, time.perf_counter() - start)
    return product.operations / best


def _best(product: "_Product", repeats: int, clock: Clock) -> float:
    product.run()  # the first one wakes the threads
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        product.run()
        best = min(best, clock() - start)
    return product.operations / best


class _Product:
    """A product of two square matrices, of which the right one is part of the model and packed as weights are."""

    def __init__(
        self, operator: str, values: NDArray[Any], weights: NDArray[Any], left: Element, result: Element
    ) -> None:
        import onnxruntime

        model = onnx_model(
            [Node(operator, "x w", "y")],
            {"x": Value(left, values.shape)},
            {"y": Value(result, values.shape)},
            {"w": weights},
            opset=21,
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = thread_count()
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._values = values
        self.operations = 2.0 * float(len(values)) ** 3

    def run(self) -> None:
        """Multiplies once."""
        self._session.run(None, {"x": self._values})


def _float_product(side: int) -> _Product:
    weights = np.random.default_rng(0).standard_normal((side, side), np.float32)
    return _Product("MatMul", weights, weights, Element.FLOAT, Element.FLOAT)


def _integer_product(side: int) -> _Product:
    weights = np.random.default_rng(0).integers(-127, 128, (side, side), np.int8)
    return _Product("MatMulInteger", np.full((side, side), 100, np.uint8), weights, Element.UINT8, Element.INT32)
