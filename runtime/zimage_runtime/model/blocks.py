"""Block programs: the model in pieces that take their weights as inputs, one program a block *shape*.

The one place where their names and shapes are written: the exporter builds them so, the executor feeds them so.
Patches and pads are the host's affair, so that no program has a shape that depends on another's values. Inputs and
outputs named here are float32 in every precision; batch is 1. Every other input is a weight, by its name in the
component less the block's own (`layers.7.attention.to_q.weight` → `attention.to_q.weight`), or a scalar that
differs between layers, by the same rule.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from .config import ModelConfig, VaeConfig
from .programs import Program, Signature


class BlockKind(StrEnum):
    """The shapes of block that a model consists of, named as their files are."""

    TEXT_LAYER = "text_layer"
    CAPTION_EMBEDDER = "caption_embedder"
    TRANSFORMER_BLOCK = "transformer_block"  # context refiners too: their four norms do not depend on the timestep
    IMAGE_EMBEDDER = "image_embedder"
    FINAL_LAYER = "final_layer"
    DECODER_IN = "decoder_in"  # the autoencoder is a chain of blocks too, whose engines are small
    RESNET = "resnet"  # of decoder and encoder alike; those of the same widths are one program
    MIDDLE_ATTENTION = "middle_attention"
    UPSAMPLE = "upsample"
    DECODER_OUT = "decoder_out"
    DECODER_TILE = "decoder_tile"  # one convolution on a piece of its map, where whole maps do not fit
    ENCODER_IN = "encoder_in"
    DOWNSAMPLE = "downsample"
    ENCODER_OUT = "encoder_out"

    @property
    def component(self) -> str:
        """The folder of the bundle whose weights the program uses."""
        return _PROGRAMS[self].component

    @property
    def program(self) -> Program:
        """The program that the block is a part of."""
        return _PROGRAMS[self]


_PROGRAMS = {
    BlockKind.TEXT_LAYER: Program.TEXT_ENCODER,
    BlockKind.CAPTION_EMBEDDER: Program.CAPTION,
    BlockKind.TRANSFORMER_BLOCK: Program.DENOISER,
    BlockKind.IMAGE_EMBEDDER: Program.DENOISER,
    BlockKind.FINAL_LAYER: Program.DENOISER,
    BlockKind.DECODER_IN: Program.DECODER,
    BlockKind.RESNET: Program.DECODER,
    BlockKind.MIDDLE_ATTENTION: Program.DECODER,
    BlockKind.UPSAMPLE: Program.DECODER,
    BlockKind.DECODER_OUT: Program.DECODER,
    BlockKind.DECODER_TILE: Program.DECODER,
    BlockKind.ENCODER_IN: Program.ENCODER,
    BlockKind.DOWNSAMPLE: Program.ENCODER,
    BlockKind.ENCODER_OUT: Program.ENCODER,
}

NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
"""A transformer block's norms, in the order of the modulation table's rows; the inputs end in `.weight`."""

MAP, MAP_OUT = "map", "map_out"
"""Feature maps between the blocks of the autoencoder, channels last: the one value that is of its block's own type."""

TILE, TILE_OUT = "tile", "tile_out"
"""Pieces of maps that stay on the host, channels first, in float32; what comes out has two rows less."""

BLOCK_SIGNATURES: dict[BlockKind, Signature] = {
    BlockKind.TEXT_LAYER: Signature(
        {
            "x": (1, "tokens", "hidden_size"),
            "cos": (1, "tokens", "half_head"),
            "sin": (1, "tokens", "half_head"),
        },
        {"y": (1, "tokens", "hidden_size")},
    ),
    BlockKind.CAPTION_EMBEDDER: Signature({"hidden_states": (1, "tokens", "hidden_size")}, {"y": (1, "tokens", "dim")}),
    BlockKind.TRANSFORMER_BLOCK: Signature(
        {"x": (1, "tokens", "dim"), "cos": (1, "tokens", "half_head"), "sin": (1, "tokens", "half_head")},
        {"y": (1, "tokens", "dim")},
    ),
    BlockKind.IMAGE_EMBEDDER: Signature({"patches": (1, "tokens", "patch_dim")}, {"y": (1, "tokens", "dim")}),
    # the velocity's negative, still in patches
    BlockKind.FINAL_LAYER: Signature(
        {"x": (1, "tokens", "dim"), "final_scale": ("dim",)}, {"patches": (1, "tokens", "patch_dim")}
    ),
    BlockKind.DECODER_IN: Signature({"latents": (1, "channels", "h", "w")}, {MAP_OUT: (1, "h", "w", "out_channels")}),
    BlockKind.RESNET: Signature({MAP: (1, "h", "w", "channels")}, {MAP_OUT: (1, "h", "w", "out_channels")}),
    BlockKind.MIDDLE_ATTENTION: Signature({MAP: (1, "h", "w", "channels")}, {MAP_OUT: (1, "h", "w", "channels")}),
    BlockKind.UPSAMPLE: Signature({MAP: (1, "h", "w", "channels")}, {MAP_OUT: (1, "out_h", "out_w", "channels")}),
    BlockKind.DECODER_OUT: Signature({MAP: (1, "h", "w", "channels")}, {"image": (1, "out_channels", "h", "w")}),
    # rows of a map with the rows beside them, of which those outside the map do not count: `inside` is 0 there, else 1
    BlockKind.DECODER_TILE: Signature(
        {
            TILE: (1, "channels", "rows", "columns"),
            "factor": (1, "channels", 1, 1),
            "summand": (1, "channels", 1, 1),
            "inside": (1, 1, "rows", 1),
        },
        {TILE_OUT: (1, "out_channels", "out_rows", "columns")},
    ),
    BlockKind.ENCODER_IN: Signature({"image": (1, "channels", "h", "w")}, {MAP_OUT: (1, "h", "w", "out_channels")}),
    BlockKind.DOWNSAMPLE: Signature({MAP: (1, "h", "w", "channels")}, {MAP_OUT: (1, "out_h", "out_w", "channels")}),
    BlockKind.ENCODER_OUT: Signature(
        {MAP: (1, "h", "w", "channels")},
        {"mean": (1, "out_channels", "h", "w"), "logvar": (1, "out_channels", "h", "w")},
    ),
}


@dataclass(frozen=True)
class BlockPlace:
    """One block of the model."""

    kind: BlockKind
    name: str = ""  # `layers.7`; empty where the weights' names have no prefix
    channels: int = 0  # of a block of the autoencoder: of what it takes, ...
    out_channels: int = 0  # ... and of what it gives
    scale: int = 1  # rows of what it takes, for each row of latents

    @property
    def out_scale(self) -> int:
        """Rows of what a block of the autoencoder gives, for each row of latents."""
        return self.scale * 2 if self.kind is BlockKind.UPSAMPLE else self.scale

    @property
    def key(self) -> str:
        """A name that no other block of the model has."""
        return f"{self.kind}:{self.name}" if self.name else self.kind.value

    def tensor(self, input_name: str) -> str:
        """The name, in the component's weights file, of what feeds an input."""
        return f"{self.name}.{input_name}" if self.name else input_name


def block_dims(place: BlockPlace, config: ModelConfig) -> dict[str, int]:
    """What the names of widths in its signature's shapes come to; all others are free."""
    text, transformer = config.text_encoder, config.transformer
    if place.kind is BlockKind.TEXT_LAYER:
        return {"hidden_size": text.hidden_size, "half_head": text.head_dim // 2}
    if place.kind.component == "vae":
        return {"channels": place.channels, "out_channels": place.out_channels}
    return {
        "hidden_size": transformer.cap_feat_dim,
        "half_head": transformer.head_dim // 2,
        "dim": transformer.dim,
        "patch_dim": transformer.patch_dim,
    }


def text_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The text encoder's layers, in order."""
    return [BlockPlace(BlockKind.TEXT_LAYER, f"layers.{index}") for index in range(config.text_encoder.used_layers)]


def caption_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The context refiners, in order."""
    return [_block(f"context_refiner.{index}") for index in range(config.transformer.n_refiner_layers)]


def noise_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The noise refiners, in order: they see image tokens alone."""
    return [_block(f"noise_refiner.{index}") for index in range(config.transformer.n_refiner_layers)]


def main_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The main layers, in order: they see [image, caption]."""
    return [_block(f"layers.{index}") for index in range(config.transformer.n_layers)]


def _block(name: str) -> BlockPlace:
    return BlockPlace(BlockKind.TRANSFORMER_BLOCK, name)


def decoder_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The decoder, in order."""
    vae, channels = config.vae, config.vae.block_out_channels[::-1]
    places = [BlockPlace(BlockKind.DECODER_IN, "decoder", vae.latent_channels, channels[0]), *_middle("decoder", vae)]
    before, scale = channels[0], 1
    for level, width in enumerate(channels):
        name = f"decoder.up_blocks.{level}"
        for index in range(vae.layers_per_block + 1):
            places.append(BlockPlace(BlockKind.RESNET, f"{name}.resnets.{index}", before, width, scale))
            before = width
        if level < len(channels) - 1:
            places.append(BlockPlace(BlockKind.UPSAMPLE, f"{name}.upsamplers.0", width, width, scale))
            scale *= 2
    out = BlockPlace(BlockKind.DECODER_OUT, "decoder", before, vae.out_channels, scale)
    return [*places, out]


def block_tiles(place: BlockPlace) -> list[BlockPlace]:
    """The convolutions over 3 x 3 pixels of one block of the decoder: what is computed in tiles of maps on the host."""
    channels, out = place.channels, place.out_channels
    parts: dict[BlockKind, dict[str, int]] = {
        BlockKind.DECODER_IN: {"conv_in": channels},
        BlockKind.RESNET: {"conv1": channels, "conv2": out},
        BlockKind.UPSAMPLE: {"conv": channels},
        BlockKind.DECODER_OUT: {"conv_out": channels},
    }
    return [
        BlockPlace(BlockKind.DECODER_TILE, f"{place.name}.{name}", width, out, place.out_scale)
        for name, width in parts.get(place.kind, {}).items()
    ]


def is_normed(tile: BlockPlace) -> bool:
    """Whether a norm and SiLU come before a tile's convolution."""
    return tile.name.rpartition(".")[2] in ("conv1", "conv2", "conv_out")


def _middle(part: str, vae: VaeConfig) -> list[BlockPlace]:
    width = vae.block_out_channels[-1]
    return [
        BlockPlace(BlockKind.RESNET, f"{part}.mid_block.resnets.0", width, width),
        BlockPlace(BlockKind.MIDDLE_ATTENTION, f"{part}.mid_block.attentions.0", width, width),
        BlockPlace(BlockKind.RESNET, f"{part}.mid_block.resnets.1", width, width),
    ]


def encoder_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The encoder, in order."""
    vae, channels = config.vae, config.vae.block_out_channels
    before, scale = channels[0], vae.scale
    places = [BlockPlace(BlockKind.ENCODER_IN, "encoder", vae.in_channels, before, scale)]
    for level, width in enumerate(channels):
        name = f"encoder.down_blocks.{level}"
        for index in range(vae.layers_per_block):
            places.append(BlockPlace(BlockKind.RESNET, f"{name}.resnets.{index}", before, width, scale))
            before = width
        if level < len(channels) - 1:
            places.append(BlockPlace(BlockKind.DOWNSAMPLE, f"{name}.downsamplers.0", width, width, scale))
            scale //= 2
    out = BlockPlace(BlockKind.ENCODER_OUT, "encoder", before, vae.latent_channels)
    return [*places, *_middle("encoder", vae), out]


CAPTION_EMBEDDER = BlockPlace(BlockKind.CAPTION_EMBEDDER)
IMAGE_EMBEDDER = BlockPlace(BlockKind.IMAGE_EMBEDDER)
FINAL_LAYER = BlockPlace(BlockKind.FINAL_LAYER)


def all_blocks(config: ModelConfig) -> Iterator[BlockPlace]:
    """Every block of a model."""
    yield from text_blocks(config)
    yield CAPTION_EMBEDDER
    yield from caption_blocks(config)
    yield IMAGE_EMBEDDER
    yield from noise_blocks(config)
    yield from main_blocks(config)
    yield FINAL_LAYER
    yield from decoder_blocks(config)
    for place in decoder_blocks(config):
        yield from block_tiles(place)
    yield from encoder_blocks(config)
