"""Small models of the programs' own operators, whose results are known: whether WebGPU computes right on an adapter.

They are as large as makes a difference: products in tiles, a softmax over more than a hundred values, weights of each
kind. What they must give is what the CPU gives. Every node has to run on the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import FloatArray
from ...bundle.manifest import Precision
from ...machine.tiny_onnx import Element, Node, Value, onnx_model
from .host_programs import session_options
from .webgpu_library import REPACKING, TURN, open_session

_TOKENS, _WIDTH, _HEADS = 160, 128, 2
_OPSET = 23
_TOLERANCE = 1e-4  # float32 rounding is a hundredth of it; fp16 sums are a hundred times as much


@dataclass(frozen=True)
class KnownAnswer:
    """A model and what it is fed with; it has one output, "y"."""

    what: str  # it shows
    model: bytes
    feeds: Mapping[str, FloatArray]


@cache
def fault_of(answer: str) -> str | None:
    """What is wrong with WebGPU's result of a known answer; None where it is right. Asked once per process."""
    return compare(ANSWERS[answer])


def compare(known: KnownAnswer) -> str | None:
    """What is wrong with WebGPU's result; None where it is the CPU's."""
    import onnxruntime

    reference = onnxruntime.InferenceSession(
        known.model, session_options(), providers=["CPUExecutionProvider"], disabled_optimizers=[REPACKING]
    )
    expected = reference.run(["y"], dict(known.feeds))[0]
    try:
        found = run_on_webgpu(known.model, known.feeds)
    except Exception as error:  # whatever the library raises
        return f"{known.what} cannot be computed ({' '.join(str(error).split())[:200]})"
    distance = relative_error(found, expected)
    return None if distance < _TOLERANCE else f"{known.what} come out wrong by {distance:.1e}"


def run_on_webgpu(model: bytes, feeds: Mapping[str, FloatArray]) -> FloatArray:
    """The output "y" of a model, every node of which runs on the device. Raises what the library raises."""
    with TURN.taken():
        session = open_session(model, session_options(), strict=True)
        values: FloatArray = session.run(["y"], dict(feeds))[0]
        del session
    return values


def relative_error(found: FloatArray, expected: FloatArray) -> float:
    """The distance in units of the expected values' norm; infinite where values are not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _random(seed: int, *shape: int) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _transformer() -> KnownAnswer:
    """A norm, a product, rotation, and attention of products and a softmax."""
    head = _WIDTH // _HEADS
    angles = np.random.default_rng(0).uniform(-3, 3, (1, _TOKENS, head // 2)).astype(np.float32)
    constants: dict[str, NDArray[Any]] = {
        "scale": 1 + _random(1, _WIDTH) / 10,
        "weight": _random(2, _WIDTH, _WIDTH) / np.float32(_WIDTH**0.5),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "split": np.array([1, _TOKENS, _HEADS, head], np.int64),
        "root": np.array(head**-0.5, np.float32),
        "joined": np.array([1, _TOKENS, _WIDTH], np.int64),
    }
    nodes = [
        Node("RMSNormalization", "x scale", "normed", {"axis": -1, "epsilon": 1e-5}),
        Node("MatMul", "normed weight", "product"),
        Node("RotaryEmbedding", "product cos sin", "rotated", {"num_heads": _HEADS, "interleaved": 1}),
        Node("Reshape", "rotated split", "heads"),
        Node("Transpose", "heads", "queries", {"perm": [0, 2, 1, 3]}),
        Node("Transpose", "heads", "keys", {"perm": [0, 2, 3, 1]}),
        Node("Mul", "queries root", "scaled"),
        Node("MatMul", "scaled keys", "scores"),
        Node("Softmax", "scores", "weights", {"axis": -1}),
        Node("MatMul", "weights queries", "mixed"),
        Node("Transpose", "mixed", "tokens", {"perm": [0, 2, 1, 3]}),
        Node("Reshape", "tokens joined", "y"),
    ]
    return _answer("attention and norms", nodes, constants, _random(3, 1, _TOKENS, _WIDTH))


def _autoencoder() -> KnownAnswer:
    """A norm of groups, a gate, a convolution, and a map twice as large."""
    channels, side = 32, 16
    constants: dict[str, NDArray[Any]] = {
        "groups": np.array([1, 8, -1], np.int64),
        "one": np.ones(8, np.float32),
        "zero": np.zeros(8, np.float32),
        "map": np.array([1, channels, side, side], np.int64),
        "weight": _random(4, channels, channels, 3, 3) / np.float32((9 * channels) ** 0.5),
        "bias": _random(5, channels),
    }
    nodes = [
        Node("Reshape", "x groups", "rows"),
        Node("InstanceNormalization", "rows one zero", "normed", {"epsilon": 1e-6}),
        Node("Reshape", "normed map", "maps"),
        Node("Sigmoid", "maps", "gate"),
        Node("Mul", "maps gate", "activated"),
        Node("Conv", "activated weight bias", "y", {"pads": [1, 1, 1, 1]}),
    ]
    return _answer("convolutions", nodes, constants, _random(6, 1, channels, side, side))


def _fp16() -> KnownAnswer:
    constants = {"weight": (_random(7, _WIDTH, _WIDTH) / 16).astype(np.float16)}
    nodes = [Node("Cast", "weight", "widened", {"to": int(Element.FLOAT)}), Node("Gemm", "x widened", "y")]
    return _answer("products with fp16 weights", nodes, constants, _random(8, _TOKENS, _WIDTH))


def _int8() -> KnownAnswer:
    constants: dict[str, NDArray[Any]] = {
        "weight": np.random.default_rng(9).integers(-127, 128, (_WIDTH, _WIDTH), np.int8),
        "scale": np.random.default_rng(10).uniform(0.001, 0.01, _WIDTH).astype(np.float32),
    }
    nodes = [Node("DequantizeLinear", "weight scale", "widened", {"axis": 1}), Node("MatMul", "x widened", "y")]
    return _answer("products with int8 weights", nodes, constants, _random(11, _TOKENS, _WIDTH))


def _int4() -> KnownAnswer:
    block = 32
    constants: dict[str, NDArray[Any]] = {
        "weight": np.random.default_rng(12).integers(0, 256, (_WIDTH, _WIDTH // block, block // 2), np.uint8),
        "scale": np.random.default_rng(13).uniform(0.01, 0.1, (_WIDTH, _WIDTH // block)).astype(np.float32),
    }
    attributes = {"K": _WIDTH, "N": _WIDTH, "bits": 4, "block_size": block, "accuracy_level": 0}
    nodes = [Node("MatMulNBits", "x weight scale", "y", attributes, domain="com.microsoft")]
    return _answer("products with int4 weights", nodes, constants, _random(14, _TOKENS, _WIDTH))


def _answer(what: str, nodes: list[Node], constants: Mapping[str, NDArray[Any]], x: FloatArray) -> KnownAnswer:
    model = onnx_model(
        nodes,
        {"x": Value(Element.FLOAT, x.shape)},
        {"y": Value(Element.FLOAT, (None,) * x.ndim)},
        constants,
        opset=_OPSET,
        domains={"com.microsoft": 1},
    )
    return KnownAnswer(what, model, {"x": x})


ANSWERS: Mapping[str, KnownAnswer] = {
    "transformer": _transformer(),
    "autoencoder": _autoencoder(),
    "fp16": _fp16(),
    "int8": _int8(),
    "int4": _int4(),
}


def answers_for(precision: Precision) -> tuple[str, ...]:
    """The known answers that concern a bundle in a precision."""
    return ("transformer", "autoencoder", *((precision.value,) if precision.value in ANSWERS else ()))
