"""Tiles of the autoencoder on a GPU, by two programs of a few nodes that are written here: no bundle has them.

The maps stay in the host's memory and the tiles take turns on the GPU, so that an image of any size is decoded in
the same VRAM, exactly as `tiling` does on the CPU. Serialized by hand, since the lean install has no `onnx`; the field
numbers are those of ``onnx.proto``.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...arrays import FloatArray
from ...tiles.kernels import Convolution, Normed, Plain

_OPSET, _IR_VERSION = 18, 10
_FLOAT, _INT64 = 1, 7  # TensorProto.DataType

Nodes = tuple[tuple[str, str, str], ...]
"""Operator, inputs and output, names separated by spaces."""

PLAIN: Nodes = (("Conv", "x weight bias", "y"),)
NORMED: Nodes = (
    ("Mul", "x scale", "scaled"),
    ("Add", "scaled shift", "normed"),
    ("Sigmoid", "normed", "gate"),
    ("Mul", "normed gate", "activated"),
    ("Pad", "activated pads", "bordered"),
    ("Conv", "bordered weight bias", "y"),
)


def model_bytes(nodes: Nodes, inputs: dict[str, tuple[int, int]]) -> bytes:
    """An ONNX model of nodes without attributes, with one output, y. Inputs by name, with element type and rank."""
    graph = b"".join(_message(1, _node(*node)) for node in nodes)
    graph += _message(2, b"tile")
    graph += b"".join(_message(11, _value(name, *kind)) for name, kind in inputs.items())
    graph += _message(12, _value("y", _FLOAT, 4))
    return _integer(1, _IR_VERSION) + _message(7, graph) + _message(8, _message(1, b"") + _integer(2, _OPSET))


def _node(kind: str, inputs: str, output: str) -> bytes:
    names = b"".join(_message(1, name.encode()) for name in inputs.split())
    return names + _message(2, output.encode()) + _message(3, output.encode()) + _message(4, kind.encode())


def _value(name: str, kind: int, rank: int) -> bytes:
    shape = _message(1, b"") * rank  # of dimensions that are not known
    return _message(1, name.encode()) + _message(2, _message(1, _integer(1, kind) + _message(2, shape)))


def _message(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


_MAP, _CHANNELS, _VECTOR = (_FLOAT, 4), (_FLOAT, 3), (_FLOAT, 1)

PLAIN_MODEL = model_bytes(PLAIN, {"x": _MAP, "weight": _MAP, "bias": _VECTOR})
NORMED_MODEL = model_bytes(
    NORMED,
    {"x": _MAP, "scale": _CHANNELS, "shift": _CHANNELS, "pads": (_INT64, 1), "weight": _MAP, "bias": _VECTOR},
)


@dataclass
class OrtTileKernels:
    """Tiles on the device of an executor, which makes the sessions and knows what its errors mean."""

    device: Any  # the executor's `Device`
    make_session: Any  # bytes of a model → its session
    tile_values: int
    _sessions: dict[bytes, Any] = field(default_factory=dict, repr=False)

    def plain(self, convolution: Convolution) -> Plain:
        """See `TileKernels`."""
        fixed = self._fixed(convolution)

        def convolve(tile: FloatArray) -> FloatArray:
            return self._run(PLAIN_MODEL, {"x": self.device.upload(tile[None]), **fixed})

        return convolve

    def normed(self, convolution: Convolution) -> Normed:
        """See `TileKernels`."""
        fixed = self._fixed(convolution)

        def run(rows: FloatArray, scale: FloatArray, shift: FloatArray, above: int, below: int) -> FloatArray:
            feeds = {"x": rows[None], "scale": scale, "shift": shift}
            values = {name: self.device.upload(value) for name, value in feeds.items()}
            pads = np.array([0, 0, above, 1, 0, 0, below, 1], np.int64)
            return self._run(NORMED_MODEL, {**values, **fixed}, pads)

        return run

    def _fixed(self, convolution: Convolution) -> dict[str, Any]:
        return {"weight": self.device.upload(convolution.weight), "bias": self.device.upload(convolution.bias)}

    def _run(self, model: bytes, values: dict[str, Any], pads: Any = None) -> FloatArray:
        if model not in self._sessions:
            self._sessions[model] = self.make_session(model)
        binding = self._sessions[model].io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        if pads is not None:
            binding.bind_cpu_input("pads", pads)  # which the operator reads on the host
        return self.device.run(self._sessions[model], binding, "y")[0]  # type: ignore[no-any-return]
