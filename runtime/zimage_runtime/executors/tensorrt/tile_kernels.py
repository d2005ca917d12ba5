"""The kernels of `tiles` on a TensorRT device: the decoder's convolutions, a tile at a time."""

from dataclasses import dataclass

import numpy as np

from ...arrays import FloatArray
from ...model.blocks import TILE, TILE_OUT
from ...tiles.kernels import ConvolutionWeights, Normed, Plain
from .decoder_tiles import TILE_VALUES
from .loaded_stage import LoadedStage
from .stage_sizes import TileShape


@dataclass(frozen=True)
class DeviceTileKernels:
    """Implements `TileKernels` with the tile programs of a stage that is loaded and prepared for them."""

    stage: LoadedStage

    @property
    def tile_values(self) -> int:
        return TILE_VALUES

    def plain(self, convolution: ConvolutionWeights) -> Plain:
        layer = self._layer(convolution)
        channels = layer.shape.place.channels
        one, zero = np.ones((channels, 1, 1), np.float32), np.zeros((channels, 1, 1), np.float32)
        return lambda tile: layer(tile, one, zero, 0, 0)[:, :, 1:-1]  # the program has borders of its own

    def normed(self, convolution: ConvolutionWeights) -> Normed:
        return self._layer(convolution)

    def _layer(self, convolution: ConvolutionWeights) -> "_Layer":
        shape = next(t for t in self.stage.plan.needs.tiles if t.place.name == convolution.name)
        self.stage.send_block(shape.place, "layer")
        return _Layer(self.stage, shape)


@dataclass(frozen=True)
class _Layer:
    """A convolution whose weights are on the device. A call returns when its result is on the host."""

    stage: LoadedStage
    shape: TileShape

    def __call__(self, rows: FloatArray, scale: FloatArray, shift: FloatArray, above: int, below: int) -> FloatArray:
        """A `Normed` kernel. A map's last tile may have fewer rows than the others; it is filled up with zeros."""
        stage, shape, count = self.stage, self.shape, rows.shape[1]
        inside = np.zeros(shape.rows, np.float32)
        inside[above : above + count] = 1
        staged = stage.staged(TILE, shape.shapes[TILE])[0]
        staged[:, :above], staged[:, above + count :] = 0, 0
        staged[:, above : above + count] = rows
        stage.upload(TILE, staged.nbytes, stage.buffer(TILE))
        for name, values in (("factor", scale), ("summand", shift), ("inside", inside)):
            stage.send(name, np.ascontiguousarray(values), stage.buffer(name))
        stage.enqueue(shape.place, stage.buffer("layer"), self._addresses(), shape.shapes)
        result = stage.receive(TILE_OUT, shape.out_shape, stage.buffer(TILE_OUT))
        stage.synchronize()
        return result()[0, :, : above + count + below - 2]

    def _addresses(self) -> dict[str, int]:
        return {name: self.stage.buffer(name) for name in (TILE, "factor", "summand", "inside", TILE_OUT)}
