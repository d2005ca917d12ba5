"""Integer matrix products that may be wrong on this processor, and the scalar that makes them right.

An int8 bundle multiplies uint8 activations with int8 weights. x86 processors without VNNI add two such products in
16 bits, which 255 * 127 * 2 overflows: the sums saturate, silently. With activations of 7 bits (zero point 64, at
most 127) no pair of products leaves 16 bits. Programs have the number of levels as an initializer that may be
overridden. Its default is the 7-bit one, which is right everywhere; all 8 bits are used only where a product with a
known answer comes out right.
"""

from functools import cache

import numpy as np

from .tiny_onnx import Element, Node, Value, onnx_model

ACTIVATION_LEVELS = "activation_levels"
"""The programs' scalar: activations are quantized to -levels … levels around the zero point levels + 1."""

EXACT_LEVELS = 127.0  # 8 bits
SAFE_LEVELS = 63.0  # 7 bits

_INNER, _WIDTH = 64, 32
_PAIR = 2 * 255 * 127  # the sum of two neighbouring products, far above 32767

KNOWN_PRODUCT_MODEL = onnx_model(
    [
        Node("MatMulInteger", "x w", "y"),
        # packed at load, as a bundle's weights are
        Node("ConstantOfShape", "shape", "constant", {"value": np.array([127], np.int8)}),
        Node("MatMulIntegerToFloat", "x constant one one", "z", domain="com.microsoft"),
    ],
    {"x": Value(Element.UINT8, ("rows", _INNER)), "w": Value(Element.INT8, (_INNER, _WIDTH))},
    {"y": Value(Element.INT32, ("rows", _WIDTH)), "z": Value(Element.FLOAT, ("rows", _WIDTH))},
    {"shape": np.array([_INNER, _WIDTH], np.int64), "one": np.array(1, np.float32)},
    opset=23,
    domains={"com.microsoft": 1},
)
"""y = x [rows, 64] times w [64, 32], and z = x times a constant of 127 in all places."""


@cache
def activation_levels() -> float:
    """The programs' scalar for this processor, which a product with a known answer decides once per process."""
    return EXACT_LEVELS if products_are_exact() else SAFE_LEVELS


def activation_bits() -> int:
    """8 where this processor's products are exact, otherwise 7."""
    return 8 if activation_levels() == EXACT_LEVELS else 7


def products_are_exact() -> bool:
    """Whether ONNX Runtime multiplies the largest uint8 activations and int8 weights without saturating.

    A few rows and a single one, packed weights and plain ones, the fused operator and the simple one: each may have a
    kernel of its own. A library that cannot run them counts as inexact.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    weights = np.full((_INNER, _WIDTH), 127, np.int8)
    try:
        session = onnxruntime.InferenceSession(KNOWN_PRODUCT_MODEL, options, providers=["CPUExecutionProvider"])
        answers = [
            answer
            for rows in (1, 5, 32)
            for answer in session.run(["y", "z"], {"x": np.full((rows, _INNER), 255, np.uint8), "w": weights})
        ]
    except Exception:  # the library's own classes share no base but Exception; 7 bits are right in any case
        return False
    return all(bool((answer == _PAIR * _INNER // 2).all()) for answer in answers)
