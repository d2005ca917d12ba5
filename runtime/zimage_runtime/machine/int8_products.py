"""Integer matrix products that may be wrong on this processor, and the scalar that makes them right.

An int8 bundle multiplies uint8 activations with int8 weights. x86 processors without VNNI add two such products in
16 bits, which 255 * 127 * 2 overflows: the sums saturate, silently. With activations of 7 bits (zero point 64, at
most 127) no pair of products leaves 16 bits. Programs have the number of levels as an initializer that may be
overridden. Its default is the 7-bit one, which is right everywhere; all 8 bits are used only where a product with a
known answer comes out right.
"""

from functools import cache

import numpy as np

ACTIVATION_LEVELS = "activation_levels"
"""The programs' scalar: activations are quantized to -levels … levels around the zero point levels + 1."""

EXACT_LEVELS = 127.0  # 8 bits
SAFE_LEVELS = 63.0  # 7 bits

_INNER, _WIDTH = 64, 32
_PAIR = 2 * 255 * 127  # what two neighbouring products come to, far above 32767

# MatMulInteger(x, w, 0) → y, and MatMulIntegerToFloat(x, constant, 1, 1, 0) → z, with x [rows, 64] and w [64, 32]; the
# constant is all 127, and is packed at load as a bundle's weights are. Serialized, because the lean install has no
# `onnx` to write it with; a test writes it again with `onnx`.
KNOWN_PRODUCT_MODEL = (
    b'\x08\x0b:\xa9\x02\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger\n7\n'
    b'\x05shape\x12\x08constant"\x0fConstantOfShape*'
    b"\x13\n\x05value*\x07\x08\x01\x10\x03J\x01\x7f\xa0\x01\x04\n?\n\x01x\n\x08constan"
    b't\n\x03one\n\x03one\x12\x01z"\x14MatMulIntegerToFlo'
    b"at:\rcom.microsoft\x12\x05check*\x1d\x08\x02\x10\x07B\x05sh"
    b"apeJ\x10@\x00\x00\x00\x00\x00\x00\x00 \x00\x00\x00\x00\x00\x00\x00*\r\x10\x01B\x03oneJ\x04\x00\x00"
    b"\x80?Z\x17\n\x01x\x12\x12\n\x10\x08\x02\x12\x0c\n\x06\x12\x04rows\n\x02\x08@Z\x13\n\x01w\x12\x0e"
    b"\n\x0c\x08\x03\x12\x08\n\x02\x08@\n\x02\x08 b\x17\n\x01y\x12\x12\n\x10\x08\x06\x12\x0c\n\x06\x12\x04row"
    b"s\n\x02\x08 b\x17\n\x01z\x12\x12\n\x10\x08\x01\x12\x0c\n\x06\x12\x04rows\n\x02\x08 B\x04\n\x00"
    b"\x10\x17B\x11\n\rcom.microsoft\x10\x01"
)


@cache
def activation_levels() -> float:
    """What the programs' scalar must be on this processor: found out once a process, by a known answer."""
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
    except Exception:  # the library's own classes share no base but Exception; 7 bits need nothing of it
        return False
    return all(bool((answer == _PAIR * _INNER // 2).all()) for answer in answers)
