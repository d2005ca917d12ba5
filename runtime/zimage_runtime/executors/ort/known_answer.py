"""A small model of a bundle's own operators, whose result is known: whether ONNX Runtime computes right on a device."""

from functools import cache
from typing import Any

import numpy as np

from ...arrays import FloatArray
from ...machine.tiny_onnx import Element, Node, Value, onnx_model

_X = np.arange(8, dtype=np.float32).reshape(2, 4)
_W = np.ascontiguousarray(_X.T)
_SCALE = np.array([1, 2], np.float32)


@cache
def known_answer_model() -> bytes:
    """MatMul, then RMSNormalization, of opset 23 like a bundle's programs: x [2, 4], w [4, 2], scale [2] → z [2, 2]."""
    shapes = {"x": _X.shape, "w": _W.shape, "scale": _SCALE.shape}
    return onnx_model(
        [Node("MatMul", "x w", "y"), Node("RMSNormalization", "y scale", "z")],
        {name: Value(Element.FLOAT, shape) for name, shape in shapes.items()},
        {"z": Value(Element.FLOAT, (2, 2))},
        opset=23,
    )


def known_answer(providers: list[str], **options: Any) -> tuple[FloatArray, Any]:
    """What the model gives with a list of providers, and its session. Raises whatever the library raises."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(known_answer_model(), settings, providers=providers, **options)
    answer: FloatArray = session.run(["z"], {"x": _X, "w": _W, "scale": _SCALE})[0]
    return answer, session


def is_right(answer: FloatArray) -> bool:
    """Whether an answer is the one that numpy gives."""
    product = _X @ _W
    expected = product / np.sqrt(np.mean(product**2, axis=-1, keepdims=True)) * _SCALE
    return bool(np.allclose(answer, expected, rtol=1e-4))
