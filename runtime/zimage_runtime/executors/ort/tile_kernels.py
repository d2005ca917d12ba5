"""The kernels of `tiles` on a GPU: two programs of a few nodes, which are written here and are in no bundle.

Maps stay in the host's memory, and tiles take turns on the GPU. So an image of any size is decoded in the same amount
of VRAM, exactly as on the CPU.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...arrays import FloatArray
from ...machine.tiny_onnx import Element, Node, Value, onnx_model
from ...tiles.kernels import ConvolutionWeights, Normed, Plain
from ..worker import Stop

_OPSET = 18
_MAP = Value(Element.FLOAT, (None, None, None, None))  # [1, channels, height, width]
_CHANNELS = Value(Element.FLOAT, (None, None, None))  # [channels, 1, 1]
_VECTOR = Value(Element.FLOAT, (None,))

PLAIN_MODEL = onnx_model(
    [Node("Conv", "x weight bias", "y")], {"x": _MAP, "weight": _MAP, "bias": _VECTOR}, {"y": _MAP}, opset=_OPSET
)
NORMED_MODEL = onnx_model(
    [
        Node("Mul", "x scale", "scaled"),
        Node("Add", "scaled shift", "normed"),
        Node("Sigmoid", "normed", "gate"),
        Node("Mul", "normed gate", "activated"),
        Node("Pad", "activated pads", "bordered"),
        Node("Conv", "bordered weight bias", "y"),
    ],
    {
        "x": _MAP,
        "scale": _CHANNELS,
        "shift": _CHANNELS,
        "pads": Value(Element.INT64, (None,)),
        "weight": _MAP,
        "bias": _VECTOR,
    },
    {"y": _MAP},
    opset=_OPSET,
)


@dataclass
class OrtTileKernels:
    """Implements `TileKernels` on an executor's device."""

    device: Any  # an `OrtDevice`
    make_session: Any  # bytes of a model → its session
    tile_values: int
    stop: Stop = field(default_factory=Stop)
    _sessions: dict[bytes, Any] = field(default_factory=dict, repr=False)

    def plain(self, convolution: ConvolutionWeights) -> Plain:
        fixed = self._fixed(convolution)

        def convolve(tile: FloatArray) -> FloatArray:
            return self._run(PLAIN_MODEL, {"x": self.device.upload(tile[None]), **fixed})

        return convolve

    def normed(self, convolution: ConvolutionWeights) -> Normed:
        fixed = self._fixed(convolution)

        def run(rows: FloatArray, scale: FloatArray, shift: FloatArray, above: int, below: int) -> FloatArray:
            feeds = {"x": rows[None], "scale": scale, "shift": shift}
            values = {name: self.device.upload(value) for name, value in feeds.items()}
            pads = np.array([0, 0, above, 1, 0, 0, below, 1], np.int64)
            return self._run(NORMED_MODEL, {**values, **fixed}, pads)

        return run

    def _fixed(self, convolution: ConvolutionWeights) -> dict[str, Any]:
        return {"weight": self.device.upload(convolution.weight), "bias": self.device.upload(convolution.bias)}

    def _run(self, model: bytes, values: dict[str, Any], pads: Any = None) -> FloatArray:
        if model not in self._sessions:
            self._sessions[model] = self.make_session(model)
        binding = self._sessions[model].io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        if pads is not None:
            binding.bind_cpu_input("pads", pads)  # the operator reads them on the host
        return self.device.run(self._sessions[model], binding, "y", self.stop)[0]  # type: ignore[no-any-return]
