"""The autoencoder as two programs: decoder, and encoder (with mean and log-variance, for img2img).

Group norms are instance norms over reshaped groups, which ONNX Runtime has a CPU kernel for; `GroupNormalization`
would be expanded into a dozen operators each. Source: ``autoencoder_kl.py``, ``vae.py``, ``resnet.py`` in diffusers.
"""

from dataclasses import dataclass

import numpy as np

from zimage_runtime.bundle.manifest import CUDA
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.blocks import TILE
from zimage_runtime.model.config import VaeConfig
from zimage_runtime.model.programs import Program

from .builder import Graph, GraphBuilder
from .target import Target

_EPS = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class VaeGraphs:
    """Builds the autoencoder's programs from its configuration."""

    config: VaeConfig
    target: Target

    def build(self) -> list[Graph]:
        """Decoder and encoder."""
        return [self.decoder(), self.encoder()]

    def decoder(self) -> Graph:
        """Latents → image."""
        b = self.target.builder(Program.DECODER, {"latent_channels": self.config.latent_channels})
        with b.scope("decoder"):
            x = self._middle(b, self.decoder_in(b, "latents"))
            for level in range(len(self.config.block_out_channels)):
                with b.scope(f"up_blocks.{level}"):
                    x = self._up(b, x, level)
            x = self.decoder_out(b, x)
        b.output(x, "image")
        return b.build()

    def decoder_in(self, b: GraphBuilder, x: str) -> str:
        """Latents → the first map."""
        return self._conv(b, x, "conv_in", self.config.block_out_channels[-1], self.config.latent_channels)

    def _up(self, b: GraphBuilder, x: str, level: int) -> str:
        """One up block, the first of which is level 0: a map → one of twice the height and width, the last excepted."""
        channels = self.config.block_out_channels[::-1]
        width = channels[max(level - 1, 0)]
        for index in range(self.config.layers_per_block + 1):
            with b.scope(f"resnets.{index}"):
                x, width = self.resnet(b, x, channels[level], width), channels[level]
        if level == len(channels) - 1:
            return x
        with b.scope("upsamplers.0"):
            return self.upsample(b, x, width)

    def decoder_out(self, b: GraphBuilder, x: str) -> str:
        """The last map → image."""
        width = self.config.block_out_channels[0]
        return self._conv(b, self._norm_silu(b, x, "conv_norm_out", width), "conv_out", self.config.out_channels, width)

    def encoder(self) -> Graph:
        """Image → mean and log-variance of the latents."""
        b = self.target.builder(Program.ENCODER, {"latent_channels": self.config.latent_channels})
        with b.scope("encoder"):
            x = self.encoder_in(b, "image")
            for level in range(len(self.config.block_out_channels)):
                with b.scope(f"down_blocks.{level}"):
                    x = self._down(b, x, level)
            mean, logvar = self.encoder_out(b, self._middle(b, x))
        b.output(mean, "mean")
        b.output(logvar, "logvar")
        return b.build()

    def encoder_in(self, b: GraphBuilder, x: str) -> str:
        """Image → the first map."""
        return self._conv(b, x, "conv_in", self.config.block_out_channels[0], self.config.in_channels)

    def _down(self, b: GraphBuilder, x: str, level: int) -> str:
        """One down block, the first of which is level 0: a map → one of half its sides, the last excepted."""
        channels = self.config.block_out_channels
        width = channels[max(level - 1, 0)]
        for index in range(self.config.layers_per_block):
            with b.scope(f"resnets.{index}"):
                x, width = self.resnet(b, x, channels[level], width), channels[level]
        if level == len(channels) - 1:
            return x
        with b.scope("downsamplers.0"):
            return self.downsample(b, x, width)

    def encoder_out(self, b: GraphBuilder, x: str) -> tuple[str, str]:
        """The middle block's map → mean and log-variance."""
        width = self.config.block_out_channels[-1]
        x = self._norm_silu(b, x, "conv_norm_out", width)
        moments = b.cast(self._conv(b, x, "conv_out", 2 * self.config.latent_channels, width), DType.F32)
        mean, logvar = b.ops("Split", moments, name="moments", outputs=2, axis=1, num_outputs=2)
        low, high = (b.number(value) for value in _LOGVAR_RANGE)
        return mean, b.op("Clip", logvar, low, high, name="logvar_clamped")

    def _conv(
        self,
        b: GraphBuilder,
        x: str,
        name: str,
        out_width: int,
        in_width: int,
        kernel: int = 3,
        strides: int = 1,
        pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    ) -> str:
        layers = self.target.layers(b)
        prefix = f"{name}." if name else ""
        weight = layers.weight(f"{prefix}weight", (out_width, in_width, kernel, kernel), layers.compute)
        bias = layers.weight(f"{prefix}bias", (out_width,), layers.compute)
        inputs = [b.cast(x, layers.compute), weight, bias]
        shape, steps = [kernel] * 2, [strides] * 2
        return b.op("Conv", *inputs, name=name or "convolution", kernel_shape=shape, strides=steps, pads=pads)

    def _group_norm(self, b: GraphBuilder, x: str, name: str, width: int) -> str:
        return self.target.layers(b).group_norm(x, name, width, self.config.norm_num_groups, _EPS)

    def _norm_silu(self, b: GraphBuilder, x: str, name: str, width: int) -> str:
        return self.target.layers(b).silu(self._group_norm(b, x, name, width), f"{name}.silu")

    def resnet(self, b: GraphBuilder, x: str, out_width: int, in_width: int) -> str:
        """A map [batch, in_width, height, width] → [batch, out_width, height, width]."""
        h = self._conv(b, self._norm_silu(b, x, "norm1", in_width), "conv1", out_width, in_width)
        h = self._conv(b, self._norm_silu(b, h, "norm2", out_width), "conv2", out_width, out_width)
        if in_width != out_width:
            x = self._conv(b, x, "conv_shortcut", out_width, in_width, kernel=1, pads=(0, 0, 0, 0))
        return b.op("Add", x, b.cast(h, b.type_of(x)), name="residual")

    def _middle(self, b: GraphBuilder, x: str) -> str:
        width = self.config.block_out_channels[-1]
        with b.scope("mid_block"):
            with b.scope("resnets.0"):
                x = self.resnet(b, x, width, width)
            with b.scope("attentions.0"):
                x = self.middle_attention(b, x)
            with b.scope("resnets.1"):
                return self.resnet(b, x, width, width)

    def middle_attention(self, b: GraphBuilder, x: str) -> str:
        """One head over all latent positions, on the middle block's map."""
        layers, width = self.target.layers(b), self.config.block_out_channels[-1]
        tokens = b.op("Concat", b.dim(x, 0, "batch"), b.integers(-1, width), name="tokens.shape", axis=0)
        h = self._group_norm(b, x, "group_norm", width)
        h = b.op("Reshape", h, b.integers(0, width, -1), name="positions")
        h = layers.rows(b.op("Transpose", h, name="channels_last", perm=[0, 2, 1]), width)
        q, k, v = (
            layers.reshape(layers.linear(h, f"to_{kind}", width, width, bias=True), tokens, f"{kind}.tokens")
            for kind in ("q", "k", "v")
        )
        h = layers.rows(layers.attention(q, k, v, heads=1, head_dim=width), width, "scores.rows")
        h = layers.reshape(layers.linear(h, "to_out.0", width, width, bias=True), tokens, "update.tokens")
        h = b.op("Transpose", h, name="channels_first", perm=[0, 2, 1])
        h = layers.reshape(h, b.op("Shape", x, name="shape"), "update")
        return b.op("Add", x, b.cast(h, b.type_of(x)), name="residual")

    def upsample(self, b: GraphBuilder, x: str, width: int) -> str:
        """A map → one of twice its sides."""
        if self.target.executor == CUDA:
            return self._conv(b, self._repeated(b, x, width), "conv", width, width)
        scales = b.constant(np.array([1, 1, 2, 2], dtype=np.float32), "scales_1_1_2_2")
        x = b.op(
            "Resize",
            x,
            "",
            scales,
            name="nearest",
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )
        return self._conv(b, x, "conv", width, width)

    def _repeated(self, b: GraphBuilder, x: str, width: int) -> str:
        """Each pixel as two by two. CUDA has no `Resize` in bfloat16, and nothing else would run it."""
        rows = b.op("Mul", b.dim(x, 2, "rows"), b.integers(2), name="rows.doubled")
        shape = b.op("Concat", b.integers(0, width), rows, b.integers(-1), name="nearest.shape", axis=0)
        x = b.op("Unsqueeze", x, b.integers(3, 5), name="pixels")
        x = b.op("Expand", x, b.integers(1, 1, 1, 2, 1, 2), name="repeated")
        return b.op("Reshape", x, shape, name="nearest")

    def downsample(self, b: GraphBuilder, x: str, width: int) -> str:
        """A map → one of half its sides."""
        # diffusers pads below and on the right only
        return self._conv(b, x, "conv", width, width, strides=2, pads=(0, 0, 1, 1))

    def decoder_tile(self, b: GraphBuilder, out_width: int, in_width: int, *, normed: bool) -> str:
        """A convolution of rows with one more above and below, after a norm whose statistics are known, and SiLU.

        One program serves convolutions without norm too: their scalars make the gate 1, and they get factor 1 and
        summand 0.
        """
        h = b.op("Add", b.op("Mul", TILE, "factor", name="scaled"), "summand", name="normed")
        gate = b.op("Mul", b.op("Sigmoid", h, name="sigmoid"), b.scalar("silu", float(normed)), name="gate")
        gate = b.op("Add", gate, b.scalar("linear", float(not normed)), name="gate.or_one")
        h = b.op("Mul", b.op("Mul", h, gate, name="activated"), "inside", name="bordered")
        return self._conv(b, h, "", out_width, in_width, pads=(0, 1, 0, 1))
