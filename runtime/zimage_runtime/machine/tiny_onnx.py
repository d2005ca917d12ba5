"""Small ONNX models as bytes, written without the `onnx` package, which the lean install does not have.

A model is a graph of a few nodes over named values; constants are part of it. What is supported is what the runtime's
own models use: integer, float, text and tensor attributes, lists of integers or floats, free and named dimensions.
Source of the field numbers: ``onnx.proto`` in the ONNX repository; of the encoding: the protocol buffers guide.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Attribute = int | float | str | NDArray[Any] | Sequence[int] | Sequence[float]


class Element(IntEnum):
    """Types of a tensor's elements, as ``TensorProto.DataType`` numbers them."""

    FLOAT = 1
    UINT8 = 2
    INT8 = 3
    INT32 = 6
    INT64 = 7
    FLOAT16 = 10


_ELEMENTS = {
    np.dtype(np.float32): Element.FLOAT,
    np.dtype(np.uint8): Element.UINT8,
    np.dtype(np.int8): Element.INT8,
    np.dtype(np.int32): Element.INT32,
    np.dtype(np.int64): Element.INT64,
    np.dtype(np.float16): Element.FLOAT16,
}


@dataclass(frozen=True)
class Node:
    """One operator. Names of values are separated by spaces; the node is called as its first output."""

    operator: str
    inputs: str
    outputs: str
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""  # of the operator; "" is ONNX's own


@dataclass(frozen=True)
class Value:
    """Type and shape of an input or output. A dimension is a size, a name, or None where it is free."""

    element: Element
    shape: tuple[int | str | None, ...]


def onnx_model(
    nodes: Sequence[Node],
    inputs: Mapping[str, Value],
    outputs: Mapping[str, Value],
    constants: Mapping[str, NDArray[Any]] | None = None,
    *,
    opset: int,
    domains: Mapping[str, int] | None = None,
) -> bytes:
    """A serialized model. `opset` is the version of ONNX's operators, `domains` the versions of other domains."""
    graph = [
        *(_message(1, _node(node)) for node in nodes),
        _text(2, "graph"),
        *(_message(5, _tensor(array, name)) for name, array in (constants or {}).items()),
        *(_message(11, _value(name, value)) for name, value in inputs.items()),
        *(_message(12, _value(name, value)) for name, value in outputs.items()),
    ]
    versions = {"": opset, **(domains or {})}
    imports = [_message(8, _text(1, domain) + _integer(2, version)) for domain, version in versions.items()]
    return _integer(1, _IR_VERSION) + _message(7, b"".join(graph)) + b"".join(imports)


_IR_VERSION = 10  # read by every ONNX Runtime from 1.20 on; the runtime needs 1.23


def _node(node: Node) -> bytes:
    outputs = node.outputs.split()
    parts = [
        *(_text(1, name) for name in node.inputs.split()),
        *(_text(2, name) for name in outputs),
        _text(3, outputs[0]),
        _text(4, node.operator),
        *(_message(5, _attribute(name, value)) for name, value in node.attributes.items()),
    ]
    if node.domain:
        parts.append(_text(7, node.domain))
    return b"".join(parts)


def _attribute(name: str, value: Attribute) -> bytes:
    """``AttributeProto``: each kind of value has a field, and field 20 says which one counts."""
    if isinstance(value, np.ndarray):
        kind, content = 4, _message(5, _tensor(value))
    elif isinstance(value, str):
        kind, content = 3, _text(4, value)
    elif isinstance(value, int):
        kind, content = 2, _integer(3, value)
    elif isinstance(value, float):
        kind, content = 1, _float(2, value)
    elif all(isinstance(item, int) for item in value):
        kind, content = 7, b"".join(_integer(8, int(item)) for item in value)
    else:
        kind, content = 6, b"".join(_float(7, item) for item in value)
    return _text(1, name) + content + _integer(20, kind)


def _tensor(array: NDArray[Any], name: str = "") -> bytes:
    little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
    sizes = b"".join(_integer(1, size) for size in array.shape)
    named = _text(8, name) if name else b""
    return sizes + _integer(2, _ELEMENTS[array.dtype]) + named + _message(9, little_endian.tobytes())


def _value(name: str, value: Value) -> bytes:
    shape = b"".join(_message(1, _dimension(size)) for size in value.shape)
    tensor = _integer(1, value.element) + _message(2, shape)
    return _text(1, name) + _message(2, _message(1, tensor))


def _dimension(size: int | str | None) -> bytes:
    if size is None:
        return b""
    return _text(2, size) if isinstance(size, str) else _integer(1, size)


def _message(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode())


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value % (1 << 64))  # negative numbers are written as 64 bits


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
