"""The autoencoder as two programs: decoder, and encoder (with mean and log-variance, for img2img).

Group norms are instance norms over reshaped groups, for which ONNX Runtime has a CPU kernel; each
`GroupNormalization` would be expanded into a dozen operators.
Source: ``autoencoder_kl.py``, ``vae.py``, ``resnet.py`` in diffusers.
"""

from dataclasses import dataclass

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.blocks import (
    TILE,
    BlockKind,
    BlockPlace,
    Convolution,
    convolutions,
    is_normed,
    program_blocks,
)
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.linears import block_linears
from zimage_runtime.model.norms import Norm, block_norms
from zimage_runtime.model.programs import Program

from .builder import Graph, GraphBuilder
from .target import Target

_LOGVAR_RANGE = (-30.0, 20.0)
_PADS = {(3, 1): (1, 1, 1, 1), (3, 2): (0, 0, 1, 1), (1, 1): (0, 0, 0, 0)}
"""By side and stride of a convolution; with a stride of 2, diffusers pads below and on the right only."""


@dataclass(frozen=True)
class VaeGraphs:
    """Builds the autoencoder's programs from its configuration."""

    config: ModelConfig
    target: Target

    def decoder(self) -> Graph:
        """Latents → image."""
        b = self._builder(Program.DECODER)
        (image,) = self._chain(b, Program.DECODER, "latents")
        b.output(image, "image")
        return b.build()

    def encoder(self) -> Graph:
        """Image → mean and log-variance of the latents."""
        b = self._builder(Program.ENCODER)
        mean, logvar = self._chain(b, Program.ENCODER, "image")
        b.output(mean, "mean")
        b.output(logvar, "logvar")
        return b.build()

    def _builder(self, program: Program) -> GraphBuilder:
        return self.target.builder(program, {"latent_channels": self.config.vae.latent_channels})

    def _chain(self, b: GraphBuilder, program: Program, x: str) -> tuple[str, ...]:
        values: tuple[str, ...] = (x,)
        for place in program_blocks(program, self.config):
            with b.scope(place.name):
                values = self.block(b, place, values[0])
        return values

    def block(self, b: GraphBuilder, place: BlockPlace, x: str) -> tuple[str, ...]:
        """One block: a map [batch, channels, height, width] → another one; the encoder's last gives two.

        Its weights are named by the builder's scope.
        """
        match place.kind:
            case BlockKind.RESNET:
                return (self._resnet(b, place, x),)
            case BlockKind.MIDDLE_ATTENTION:
                return (self._attention(b, place, x),)
            case BlockKind.UPSAMPLE:
                return (self._upsample(b, place, x),)
            case BlockKind.DECODER_OUT:
                return (self._normed_convolution(b, place, x),)
            case BlockKind.ENCODER_OUT:
                return self._moments(b, self._normed_convolution(b, place, x))
            case BlockKind.DECODER_TILE:
                return (self._tile(b, place),)
            case _:
                return (self._conv(b, x, convolutions(place)[0]),)

    def _normed_convolution(self, b: GraphBuilder, place: BlockPlace, x: str) -> str:
        (norm,), (convolution,) = block_norms(place, self.config), convolutions(place)
        return self._conv(b, self._norm_silu(b, x, norm), convolution)

    def _moments(self, b: GraphBuilder, x: str) -> tuple[str, str]:
        """The encoder's last map → mean and log-variance."""
        mean, logvar = b.ops("Split", b.cast(x, DType.F32), name="moments", outputs=2, axis=1, num_outputs=2)
        low, high = (b.number(value) for value in _LOGVAR_RANGE)
        return mean, b.op("Clip", logvar, low, high, name="logvar_clamped")

    def _conv(self, b: GraphBuilder, x: str, c: Convolution, pads: tuple[int, int, int, int] | None = None) -> str:
        layers = self.target.layers(b)
        prefix = f"{c.name}." if c.name else ""
        weight = layers.weight(f"{prefix}weight", (c.out_channels, c.in_channels, c.side, c.side), layers.compute)
        bias = layers.weight(f"{prefix}bias", (c.out_channels,), layers.compute)
        return b.op(
            "Conv",
            *(b.cast(x, layers.compute), weight, bias),
            name=c.name or "convolution",
            kernel_shape=[c.side] * 2,
            strides=[c.stride] * 2,
            pads=pads or _PADS[c.side, c.stride],
        )

    def _group_norm(self, b: GraphBuilder, x: str, norm: Norm) -> str:
        return self.target.layers(b).group_norm(x, norm)

    def _norm_silu(self, b: GraphBuilder, x: str, norm: Norm) -> str:
        return self.target.layers(b).silu(self._group_norm(b, x, norm), f"{norm.name}.silu")

    def _resnet(self, b: GraphBuilder, place: BlockPlace, x: str) -> str:
        first, second, *shortcut = convolutions(place)
        before_first, before_second = block_norms(place, self.config)
        h = self._conv(b, self._norm_silu(b, x, before_first), first)
        h = self._conv(b, self._norm_silu(b, h, before_second), second)
        if shortcut:
            x = self._conv(b, x, shortcut[0])
        return b.op("Add", x, b.cast(h, b.type_of(x)), name="residual")

    def _attention(self, b: GraphBuilder, place: BlockPlace, x: str) -> str:
        """One head over all latent positions."""
        layers, width = self.target.layers(b), place.channels
        (norm,) = block_norms(place, self.config)
        *projections, out = block_linears(place, self.config)
        tokens = b.op("Concat", b.dim(x, 0, "batch"), b.integers(-1, width), name="tokens.shape", axis=0)
        h = self._group_norm(b, x, norm)
        h = b.op("Reshape", h, b.integers(0, width, -1), name="positions")
        h = layers.rows(b.op("Transpose", h, name="channels_last", perm=[0, 2, 1]), width)
        q, k, v = (
            layers.reshape(layers.linear(h, linear), tokens, f"{kind}.tokens")
            for kind, linear in zip("qkv", projections, strict=True)
        )
        h = layers.rows(layers.spatial_attention(q, k, v, width), width, "scores.rows")
        h = layers.reshape(layers.linear(h, out), tokens, "update.tokens")
        h = b.op("Transpose", h, name="channels_first", perm=[0, 2, 1])
        h = layers.reshape(h, b.op("Shape", x, name="shape"), "update")
        return b.op("Add", x, b.cast(h, b.type_of(x)), name="residual")

    def _upsample(self, b: GraphBuilder, place: BlockPlace, x: str) -> str:
        """A map → one of twice its sides."""
        (convolution,) = convolutions(place)
        return self._conv(b, self.target.layers(b).doubled(x, place.channels), convolution)

    def _tile(self, b: GraphBuilder, place: BlockPlace) -> str:
        """A convolution of rows with one more above and below, after a norm whose statistics are known, and SiLU.

        One program serves convolutions without norm too: their scalars make the gate 1, and they get factor 1 and
        summand 0.
        """
        normed = is_normed(place)
        h = b.op("Add", b.op("Mul", TILE, "factor", name="scaled"), "summand", name="normed")
        gate = b.op("Mul", b.op("Sigmoid", h, name="sigmoid"), b.scalar("silu", float(normed)), name="gate")
        gate = b.op("Add", gate, b.scalar("linear", float(not normed)), name="gate.or_one")
        h = b.op("Mul", b.op("Mul", h, gate, name="activated"), "inside", name="bordered")
        return self._conv(b, h, Convolution("", place.out_channels, place.channels), pads=(0, 1, 0, 1))
