"""Which operators ONNX Runtime's CUDA provider has kernels for, in which types, as far as our programs use them.

Source: ``docs/OperatorKernels.md`` in microsoft/onnxruntime, which its build makes from the registered kernels
(commit 001d12d2623fd411ce0f83d05abb5e82304a3389); the rows that hold for opset 23.
"""

from onnx import TensorProto

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
_ALL_FLOATS = {*_FLOATS, TensorProto.BFLOAT16}
_BYTES = {TensorProto.INT8, TensorProto.UINT8}
_INTEGERS = {*_BYTES, TensorProto.INT32, TensorProto.INT64}
_ANY = {*_ALL_FLOATS, *_INTEGERS}

KERNELS: dict[str, set[int]] = {
    "Abs": {*_FLOATS, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64},
    "Add": _ANY,
    "Attention": _ALL_FLOATS,
    "Cast": _ANY,
    "Clip": {*_FLOATS, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT64},
    "Concat": _ANY,
    "Conv": _ALL_FLOATS,
    "DequantizeLinear": _BYTES,
    "Div": _ANY,
    "Expand": _ANY,
    "Gemm": _ALL_FLOATS,
    "Identity": _ANY,
    "LayerNormalization": _ALL_FLOATS,
    "MatMul": _ALL_FLOATS,
    "MatMulInteger": {TensorProto.INT8},
    "MatMulNBits": _ALL_FLOATS,
    "Max": {*_ALL_FLOATS, TensorProto.INT32, TensorProto.INT64},
    "Mul": _ANY,
    "Neg": {*_ALL_FLOATS, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64},
    "QuantizeLinear": _FLOATS,
    "RMSNormalization": _ALL_FLOATS,
    "ReduceMax": {*_FLOATS, TensorProto.INT32, TensorProto.INT64},
    "ReduceMin": {*_FLOATS, *_BYTES, TensorProto.INT32, TensorProto.INT64},
    "Reshape": _ANY,
    "Resize": {*_FLOATS, TensorProto.INT32, TensorProto.UINT8},
    "RotaryEmbedding": _ALL_FLOATS,
    "Round": _FLOATS,
    "Shape": _ANY,
    "Sigmoid": _ALL_FLOATS,
    "Slice": _ANY,
    "Split": _ANY,
    "Sub": _ANY,
    "Transpose": _ANY,
    "Unsqueeze": _ANY,
}
"""By operator, the types that its data may have (``T`` in the table, or its first constraint)."""

OTHER_TYPES: dict[tuple[str, int], set[int]] = {
    ("DequantizeLinear", 1): _FLOATS,
    ("MatMulInteger", 1): {TensorProto.INT8},
    ("MatMulNBits", 1): {TensorProto.UINT8},
    ("QuantizeLinear", 2): _BYTES,
}
"""By operator and input, the types of data under a constraint of their own."""

CONTRIB = {"MatMulNBits"}
"""Operators of the domain com.microsoft."""

SHAPE_INPUTS: dict[str, set[int]] = {
    "Expand": {1},
    "Reshape": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Unsqueeze": {1},
    "MatMulInteger": {2, 3},
    "ReduceMax": {1},
    "ReduceMin": {1},
    "Resize": {1, 2, 3},
}
"""Inputs that the kernels read on the host (registered with ``InputMemoryType(OrtMemTypeCPUInput)``)."""
