"""What `tiling` computes on a tile: a 3 x 3 convolution, with or without a norm and SiLU before it.

Tiles are [channels, rows, width]. A kernel is made once per layer, so that the layer's weights are laid out, or copied
to a device, once. The kernels here are numpy's; executors bring those of their devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..arrays import FloatArray
from ..bundle.tensors import TensorFile, to_float32

Plain = Callable[[FloatArray], FloatArray]
"""A tile with a border of one pixel → its convolution, without the border."""

Normed = Callable[[FloatArray, FloatArray, FloatArray, int, int], FloatArray]
"""Rows; a factor and a summand per channel, [channels, 1, 1]; rows of zeros to add above and below, 1 each where the
map ends and otherwise 0 → SiLU of the normed rows, bordered by zeros and convolved: the rows and those added, less
two."""


@dataclass(frozen=True)
class ConvolutionWeights:
    """A layer's 3 x 3 convolution, by its name in a component's weights."""

    name: str
    weights: TensorFile

    @property
    def weight(self) -> FloatArray:
        """[out, in, 3, 3]. Raises `TensorFileError` where the file lacks it."""
        return to_float32(*self.weights.array(f"{self.name}.weight"))

    @property
    def bias(self) -> FloatArray:
        """[out]."""
        return to_float32(*self.weights.array(f"{self.name}.bias"))

    @property
    def out_channels(self) -> int:
        """Channels of the result, known from the bias alone."""
        return len(self.weights.array(f"{self.name}.bias")[0])


class TileKernels(Protocol):
    """Makes the kernels of layers, on one kind of device."""

    @property
    def tile_values(self) -> int:
        """Values in a tile, all channels together."""

    def plain(self, convolution: ConvolutionWeights) -> Plain:
        """The kernel of a convolution."""

    def normed(self, convolution: ConvolutionWeights) -> Normed:
        """The kernel of a group norm with known statistics, SiLU and a convolution."""


@dataclass(frozen=True)
class NumpyTileKernels:
    """Kernels on the CPU: nine matrix products per tile."""

    tile_values: int = 1 << 20  # 4 MB, which fits in processors' caches
    check: Callable[[], object] = lambda: None  # called before each tile; raises to stop

    def plain(self, convolution: ConvolutionWeights) -> Plain:
        """The kernel of a convolution, whose weight is laid out by taps once."""
        taps = np.ascontiguousarray(convolution.weight.transpose(2, 3, 0, 1))  # [3, 3, out, in]
        bias = convolution.bias

        def convolve(tile: FloatArray) -> FloatArray:
            self.check()
            result = convolved(tile, taps)
            result += bias[:, None, None]
            return result

        return convolve

    def normed(self, convolution: ConvolutionWeights) -> Normed:
        """The same after a norm and SiLU, which are computed in place in the bordered tile."""
        convolve = self.plain(convolution)

        def run(rows: FloatArray, scale: FloatArray, shift: FloatArray, above: int, below: int) -> FloatArray:
            channels, count, width = rows.shape
            tile = np.zeros((channels, above + count + below, width + 2), np.float32)
            inner = tile[:, above : above + count, 1:-1]
            np.multiply(rows, scale, out=inner)
            inner += shift
            with np.errstate(over="ignore"):  # exp gives infinity below -88, where SiLU is 0 in float32
                gate = np.exp(-inner)
            gate += 1
            inner /= gate
            return convolve(tile)

        return run


def convolved(tile: FloatArray, taps: FloatArray) -> FloatArray:
    """A tile with a border of one pixel, [in, rows + 2, width + 2], and taps [3, 3, out, in] → [out, rows, width].

    In the flattened tile, a tap reads one slice, shifted. The slice runs through the border, whose columns are dropped.
    """
    channels, rows, width = tile.shape[0], tile.shape[1] - 2, tile.shape[2]
    flat = tile.reshape(channels, -1)
    length = rows * width - 2
    total = np.empty((taps.shape[2], rows * width), np.float32)
    product = np.empty((taps.shape[2], length), np.float32)
    used = total[:, :length]
    for row in range(3):
        for column in range(3):
            start = row * width + column
            if start:
                used += np.matmul(taps[row, column], flat[:, start : start + length], out=product)
            else:
                np.matmul(taps[0, 0], flat[:, :length], out=used)
    return total.reshape(-1, rows, width)[:, :, :-2]
