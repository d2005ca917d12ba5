"""Decoding and encoding a large image in tiles, in a third to a half of the whole program's memory.

Tiles that are decoded independently leave visible seams, because the group norms and the attention see the whole image.
Measured against the whole image, with random weights on 96 x 96 latents: 20 dB with tiles of 32 latents that overlap by
16, and 27 dB with 64 and 32. With the middle block on the whole image and only the up blocks in tiles (24 of 48
latents, overlapping by 12): 21 dB.

So the tiles here are cut inside each layer. A layer reads a map of the whole image and writes one. In between, it works
on a tile of full rows, plus the one row on each side that a 3 x 3 convolution reaches. Group norms use the statistics
of the whole map. Nothing is approximated, so there is no seam to blend: only rounding differs, above 100 dB.

Bytes of a tiled stage are estimated in three places that follow slightly different rules. `tiled_bytes` and
`tiled_encoder_bytes` count the maps, one layer's weights, and `_TILE_COPIES` tiles of `TILE_VALUES`, as numpy's kernels
keep them. Where a GPU computes the tiles, the maps stay in the host's memory, which the plan for ONNX Runtime
(`executors.ort.device_plan._TILE_COPIES_ON_HOST`) corrects by four copies of what a tile there is larger than
`TILE_VALUES`. TensorRT's tiles (`executors.tensorrt.decoder_tiles.TILES_ON_HOST`) add four whole tiles of their own,
and so count those of numpy besides.

Shapes: a map is [channels, height, width]; images of a batch are decoded one after the other.
Source: ``vae.py`` and ``resnet.py`` in diffusers, like the decoder program.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..arrays import FloatArray
from ..bundle.tensors import TensorFile, to_float32
from ..model.config import VaeConfig
from .kernels import ConvolutionWeights, NumpyTileKernels, TileKernels

_ON_CPU = NumpyTileKernels()

TILE_VALUES = _ON_CPU.tile_values
"""Values in a tile on the CPU, all channels together."""

TILE_ROWS = 128
"""The most rows in a tile, so that programs on a device have a limit."""

_TILE_COPIES = 5  # tiles in memory at once: rows, their activation, the padded copy, a product and its sum
_EPS = 1e-6

Rows = Callable[[int, int], FloatArray]
"""Rows start to stop of a map, computed on request: [channels, stop - start, width]."""


def tile_rows(channels: int, width: int, values: int = TILE_VALUES) -> int:
    """Rows in a tile of a map of `channels` and `width`, so that the tile has about `values`: at least one row."""
    return min(max(values // (channels * width), 1), TILE_ROWS)


def tiled_bytes(config: VaeConfig, width: int, height: int) -> int:
    """Bytes needed at the peak of decoding a `width` x `height` image in tiles on the host.

    They are the maps that a layer reads and writes, tiles, and one layer's weights. See the module's docstring for
    tiles on a GPU.
    """
    channels = config.block_out_channels[::-1]
    attention = 5 * channels[0]  # the map, its norm, queries, keys, values
    widest = attention * config.scale**-2  # in values per pixel
    before = channels[0]
    for level, out in enumerate(channels):
        positions = 4.0**level / config.scale**2  # of this level's maps, per pixel
        widest = max(widest, (before + 2 * out if before < out else before + out) * positions)
        if level < len(channels) - 1:
            widest = max(widest, out * 5 * positions)  # a map and the four times larger one made from it
        before = out
    tile = max(TILE_VALUES, max(channels) * (width + 2) * 3) * _TILE_COPIES
    weights = 2 * 9 * max(channels) ** 2
    return int(4 * ((widest + config.out_channels) * width * height + tile + weights))


def tiled_encoder_bytes(config: VaeConfig, width: int, height: int) -> int:
    """Bytes needed at the peak of encoding a `width` x `height` image in tiles, by the same rule as `tiled_bytes`."""
    channels = config.block_out_channels
    widest = max(2 * channels[0], 5 * channels[-1] * config.scale**-2)  # a resnet at the top, the attention below
    before = channels[0]
    for level, out in enumerate(channels):
        widest = max(widest, (before + 2 * out if before < out else before + out) / 4.0**level)
        before = out
    tile = max(TILE_VALUES, max(channels) * (width + 2) * 3) * _TILE_COPIES
    weights = 2 * 9 * max(channels) ** 2
    return int(4 * ((widest + config.in_channels) * width * height + tile + weights))


Step = Callable[[FloatArray], FloatArray]
"""A part of the autoencoder: a map → the next one. It may overwrite its input."""


@dataclass(frozen=True)
class _Normed:
    """A map to be normed, by a factor and a summand per channel [channels, 1, 1], and put through SiLU."""

    x: FloatArray
    scale: FloatArray
    shift: FloatArray


@dataclass(frozen=True)
class _TiledLayers:
    """The layers that decoder and encoder share, computed from the bundle's weights."""

    config: VaeConfig
    weights: TensorFile
    kernels: TileKernels = _ON_CPU

    @property
    def tile_values(self) -> int:
        """Values in a tile, all channels together."""
        return self.kernels.tile_values

    def _middle(self, name: str) -> list[Step]:
        return [
            partial(self._resnet, f"{name}.resnets.0"),
            partial(self._attend, f"{name}.attentions.0"),
            partial(self._resnet, f"{name}.resnets.1"),
        ]

    def _resnet(self, name: str, x: FloatArray) -> FloatArray:
        """Overwrites `x` unless the result has more channels, so that one map less is in memory."""
        h = self._convolve(f"{name}.conv1", self._norm_silu(f"{name}.norm1", x), x.shape)
        shortcut = _rows(x)
        if h.shape[0] != x.shape[0]:
            weight = self._weight(f"{name}.conv_shortcut.weight")[:, :, 0, 0]
            bias = self._weight(f"{name}.conv_shortcut.bias")[:, None, None]

            def shortcut(start: int, stop: int) -> FloatArray:
                flat = weight @ x[:, start:stop].reshape(x.shape[0], -1)
                return flat.reshape(len(weight), stop - start, -1) + bias

        out = x[: h.shape[0]] if h.shape[0] <= x.shape[0] else np.empty_like(h)
        return self._convolve(f"{name}.conv2", self._norm_silu(f"{name}.norm2", h), h.shape, out, shortcut)

    def _attend(self, name: str, x: FloatArray) -> FloatArray:
        """Adds the attention's update to `x`: one head over all positions, some queries at a time."""
        channels, count = x.shape[0], x.shape[1] * x.shape[2]
        scale, shift = self._norm(f"{name}.group_norm", x)
        positions = x.reshape(channels, count)  # a view
        normed = positions * scale[:, 0] + shift[:, 0]
        q, k, v = (
            self._weight(f"{name}.to_{kind}.weight") @ normed + self._weight(f"{name}.to_{kind}.bias")[:, None]
            for kind in ("q", "k", "v")
        )
        del normed
        q *= np.float32(1 / math.sqrt(channels))
        weight = self._weight(f"{name}.to_out.0.weight")
        bias = self._weight(f"{name}.to_out.0.bias")[:, None]
        step = max(self.tile_values // count, 1)
        for start in range(0, count, step):
            scores = q[:, start : start + step].T @ k
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            positions[:, start : start + step] += weight @ (v @ scores.T) + bias
        return x

    def _norm_silu(self, name: str, x: FloatArray) -> _Normed:
        return _Normed(x, *self._norm(name, x))

    def _norm(self, name: str, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """A group norm as factor and summand of each channel, [channels, 1, 1], from statistics of the whole map."""
        groups = self.config.norm_num_groups
        flat = x.reshape(groups, -1)
        mean = flat.mean(axis=1, dtype=np.float64)
        variance = np.array([_mean_square(group, center) for group, center in zip(flat, mean, strict=True)])
        each = len(x) // groups
        inverse = np.repeat(1 / np.sqrt(variance + _EPS), each)
        scale = self._weight(f"{name}.weight") * inverse
        shift = self._weight(f"{name}.bias") - np.repeat(mean, each) * scale
        return scale.astype(np.float32)[:, None, None], shift.astype(np.float32)[:, None, None]

    def _convolve(
        self,
        name: str,
        source: Rows | _Normed,
        shape: tuple[int, ...],
        out: FloatArray | None = None,
        add: Rows | None = None,
    ) -> FloatArray:
        """A 3 x 3 convolution of a map of `shape`, whose rows may reach outside the tile but not the map.

        `add` computes the tile's own rows before they are written, so `out` may be the map that it reads.
        """
        convolution = ConvolutionWeights(name, self.weights)
        channels, height, width = shape
        if out is None:
            out = np.empty((convolution.out_channels, height, width), np.float32)
        if isinstance(source, _Normed):
            tile = self._normed_tiles(source, convolution)
        else:
            tile = self._plain_tiles(source, convolution, shape)
        step = tile_rows(max(channels, len(out)), width, self.tile_values)
        for start in range(0, height, step):
            stop = min(start + step, height)
            result = tile(start, stop)
            if add is not None:
                result += add(start, stop)
            out[:, start:stop] = result
        return out

    def _normed_tiles(self, source: _Normed, convolution: ConvolutionWeights) -> Rows:
        kernel, height = self.kernels.normed(convolution), source.x.shape[1]

        def tile(start: int, stop: int) -> FloatArray:
            low, high = max(start - 1, 0), min(stop + 1, height)
            above, below = int(start == 0), int(stop == height)
            return kernel(source.x[:, low:high], source.scale, source.shift, above, below)

        return tile

    def _plain_tiles(self, rows: Rows, convolution: ConvolutionWeights, shape: tuple[int, ...]) -> Rows:
        kernel = self.kernels.plain(convolution)
        channels, height, width = shape

        def tile(start: int, stop: int) -> FloatArray:
            low, high = max(start - 1, 0), min(stop + 1, height)
            bordered = np.zeros((channels, stop - start + 2, width + 2), np.float32)
            bordered[:, low - start + 1 : high - start + 1, 1:-1] = rows(low, high)
            return kernel(bordered)

        return tile

    def _halve(self, name: str, x: FloatArray) -> FloatArray:
        """A 3 x 3 convolution at every second row and column, of a map with a border of zeros below and right."""
        convolution = ConvolutionWeights(name, self.weights)
        kernel = self.kernels.plain(convolution)
        channels, height, width = x.shape
        out = np.empty((convolution.out_channels, height // 2, width // 2), np.float32)
        step = max(tile_rows(max(channels, len(out)), width, self.tile_values) // 2, 1)
        for start in range(0, height // 2, step):
            stop = min(start + step, height // 2)
            high = min(2 * stop + 1, height)
            tile = np.zeros((channels, 2 * (stop - start) + 1, width + 1), np.float32)
            tile[:, : high - 2 * start, :-1] = x[:, 2 * start : high]
            # three of four results are dropped, which still costs less than the other layers
            out[:, start:stop] = kernel(tile)[:, ::2, ::2]
        return out

    def _weight(self, name: str) -> FloatArray:
        return to_float32(*self.weights.array(name))


@dataclass(frozen=True)
class TiledDecoder(_TiledLayers):
    """A bundle's decoder, layer by layer."""

    def __call__(self, latents: FloatArray) -> FloatArray:
        """Unscaled latents [batch, channels, h, w] → images [batch, 3, 8h, 8w], about -1 to 1.

        Raises `TensorFileError` for a weight that the bundle lacks.
        """
        return np.stack([self.resume(one, 0) for one in latents])

    def resume(self, x: FloatArray, done: int) -> FloatArray:
        """The image from the result of the first `done` steps, which is overwritten; from latents if `done` is 0."""
        for step in self.steps()[done:]:
            x = step(x)
        return x

    def steps(self) -> list[Step]:
        """The decoder in order: input, three steps of the middle, each level's resnets and upsampler, output."""
        found = [self._enter, *self._middle("decoder.mid_block")]
        levels = len(self.config.block_out_channels)
        for level in range(levels):
            block = f"decoder.up_blocks.{level}"
            count = self.config.layers_per_block + 1
            found += [partial(self._resnet, f"{block}.resnets.{index}") for index in range(count)]
            if level < levels - 1:
                found.append(partial(self._double, f"{block}.upsamplers.0.conv"))
        return [*found, self._finish]

    def _enter(self, latents: FloatArray) -> FloatArray:
        return self._convolve("decoder.conv_in", _rows(latents), latents.shape)

    def _double(self, name: str, x: FloatArray) -> FloatArray:
        channels, height, width = x.shape
        return self._convolve(name, _doubled(x), (channels, 2 * height, 2 * width))

    def _finish(self, x: FloatArray) -> FloatArray:
        return self._convolve("decoder.conv_out", self._norm_silu("decoder.conv_norm_out", x), x.shape)


@dataclass(frozen=True)
class TiledEncoder(_TiledLayers):
    """A bundle's encoder, layer by layer."""

    def __call__(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Images [batch, 3, height, width] in -1 to 1 → mean and log-variance [batch, channels, h, w].

        Raises `TensorFileError` for a weight that the bundle lacks.
        """
        moments = np.stack([self._encode(one) for one in image])
        mean, logvar = np.split(moments, 2, axis=1)
        return mean, np.clip(logvar, -30, 20)

    def _encode(self, image: FloatArray) -> FloatArray:
        x = self._convolve("encoder.conv_in", _rows(image), image.shape)
        levels = len(self.config.block_out_channels)
        for level in range(levels):
            block = f"encoder.down_blocks.{level}"
            for index in range(self.config.layers_per_block):
                x = self._resnet(f"{block}.resnets.{index}", x)
            if level < levels - 1:
                x = self._halve(f"{block}.downsamplers.0.conv", x)
        for step in self._middle("encoder.mid_block"):
            x = step(x)
        return self._convolve("encoder.conv_out", self._norm_silu("encoder.conv_norm_out", x), x.shape)


def _rows(x: FloatArray) -> Rows:
    return lambda start, stop: x[:, start:stop]


def _doubled(x: FloatArray) -> Rows:
    """Rows of the map at twice its height and width, by nearest neighbours."""

    def rows(start: int, stop: int) -> FloatArray:
        first = start // 2
        tall = x[:, first : (stop + 1) // 2].repeat(2, axis=1)[:, start - 2 * first : stop - 2 * first]
        return tall.repeat(2, axis=2)

    return rows


def _mean_square(values: FloatArray, center: float) -> float:
    """The mean square of the distance from `center`, in pieces that stay in the processor's cache."""
    total, step = 0.0, 1 << 16
    for start in range(0, len(values), step):
        piece = values[start : start + step] - np.float32(center)
        total += float(np.dot(piece, piece))
    return total / len(values)
