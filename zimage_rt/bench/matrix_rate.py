"""How fast this processor multiplies matrices with the library that we use: the ceiling that a step is held against.

The models are written by hand, for the lean install has no `onnx`: a protocol buffer of one node is a few fields.
Source of the field numbers: ``onnx.proto3`` in the ONNX repository.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .environment import threads

_SIDE = 2048  # rows, columns and depth: as large as a step's products, and quick
_REPEATS = 5

_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6  # TensorProto.DataType


def float_rate(side: int = _SIDE, repeats: int = _REPEATS, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second of a float32 MatMul, the best of a few."""
    weights = np.random.default_rng(0).standard_normal((side, side), np.float32)
    return _rate(product_model("MatMul", _FLOAT, weights, _FLOAT, _FLOAT), weights, repeats, clock)


def integer_rate(side: int = _SIDE, repeats: int = _REPEATS, clock: Callable[[], float] = time.perf_counter) -> float:
    """The same of MatMulInteger, with unsigned activations and signed weights: what an int8 bundle computes with."""
    weights = np.random.default_rng(0).integers(-127, 128, (side, side), np.int8)
    model = product_model("MatMulInteger", _UINT8, weights, _INT8, _INT32)
    return _rate(model, np.full((side, side), 100, np.uint8), repeats, clock)


def _rate(model: bytes, values: NDArray[Any], repeats: int, clock: Callable[[], float]) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    side = values.shape[0]
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = clock()
        session.run(None, {"x": values})
        best = min(best, clock() - start)
    return 2.0 * float(side) ** 3 / best


def product_model(operator: str, left: int, weights: NDArray[Any], right: int, result: int) -> bytes:
    """A model y = operator(x, w) with w inside it, so that it is laid out for speed as a bundle's weights are."""
    node = b"".join(_bytes(1, name) for name in (b"x", b"w")) + _bytes(2, b"y") + _bytes(4, operator.encode())
    sizes = b"".join(_integer(1, size) for size in weights.shape)
    tensor = sizes + _integer(2, right) + _bytes(8, b"w") + _bytes(9, weights.tobytes())
    graph = _bytes(1, node) + _bytes(2, b"product") + _bytes(5, tensor)
    graph += _bytes(11, _value(b"x", left, weights.shape)) + _bytes(12, _value(b"y", result, weights.shape))
    return _integer(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _integer(2, 21))


def _value(name: bytes, kind: int, shape: tuple[int, ...]) -> bytes:
    dimensions = b"".join(_bytes(1, _integer(1, size)) for size in shape)
    return _bytes(1, name) + _bytes(2, _bytes(1, _integer(1, kind) + _bytes(2, dimensions)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
