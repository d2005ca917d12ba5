"""The blocks that the model consists of, in the order in which they run. They are listed here alone.

The text encoder and the transformer are chains of layers (attention, then SwiGLU) with an embedder or a projection at
their ends; the autoencoder is a chain of convolutional blocks. `linears` and `norms` state what each block contains,
`block_signatures` states the inputs and outputs of a program of one block, `operations` the work.

Sources: ``transformer_z_image.py``, ``autoencoder_kl.py``, ``vae.py`` and ``resnet.py`` in diffusers;
``modeling_qwen3.py`` in transformers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from .config import ModelConfig, VaeConfig
from .programs import MODEL_PROGRAMS, Program


class BlockKind(StrEnum):
    """The shapes of block that a model consists of, named as their files are."""

    TEXT_LAYER = "text_layer"
    CAPTION_EMBEDDER = "caption_embedder"
    TRANSFORMER_BLOCK = "transformer_block"  # context refiners too: their four norms do not depend on the timestep
    IMAGE_EMBEDDER = "image_embedder"
    FINAL_LAYER = "final_layer"
    DECODER_IN = "decoder_in"  # here and below, blocks of the autoencoder
    RESNET = "resnet"  # of decoder and encoder; blocks of the same widths share a program
    MIDDLE_ATTENTION = "middle_attention"
    UPSAMPLE = "upsample"
    DECODER_OUT = "decoder_out"
    DECODER_TILE = "decoder_tile"  # one convolution on a tile of its map, where whole maps do not fit
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

    @property
    def is_layer(self) -> bool:
        """Whether the block is attention and SwiGLU. Such layers have most parameters; they are what is quantized."""
        return self in (BlockKind.TEXT_LAYER, BlockKind.TRANSFORMER_BLOCK)


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
"""Feature maps between the blocks of the autoencoder, channels last. Only they may not be float32."""

BAND = "band"
"""Positions of a map, one after the other, for which attention over the whole map is computed."""

TILE, TILE_OUT = "tile", "tile_out"
"""Tiles of maps that stay on the host, channels first, in float32. The output has two rows fewer."""


@dataclass(frozen=True)
class BlockPlace:
    """One block of the model."""

    kind: BlockKind
    name: str = ""  # `layers.7`; empty where the weights' names have no prefix
    channels: int = 0  # of the autoencoder's blocks: of the input ...
    out_channels: int = 0  # ... and of the output
    scale: int = 1  # rows of the input for each row of latents

    @property
    def out_scale(self) -> int:
        """Rows of the output of a block of the autoencoder, for each row of latents."""
        if self.kind is BlockKind.DOWNSAMPLE:
            return self.scale // 2
        return self.scale * 2 if self.kind is BlockKind.UPSAMPLE else self.scale

    @property
    def key(self) -> str:
        """A name that is unique among the blocks of the model."""
        return f"{self.kind}:{self.name}" if self.name else self.kind.value

    def tensor(self, input_name: str) -> str:
        """The name in the component's weights file of the tensor for an input."""
        return f"{self.name}.{input_name}" if self.name else input_name


def text_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The text encoder's layers, in order; its last one is never used."""
    return [BlockPlace(BlockKind.TEXT_LAYER, f"layers.{index}") for index in range(config.text_encoder.used_layers)]


def caption_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The context refiners, in order: they run on caption tokens only."""
    return _transformer_blocks("context_refiner", config.transformer.n_refiner_layers)


def noise_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The noise refiners, in order: they run on image tokens only."""
    return _transformer_blocks("noise_refiner", config.transformer.n_refiner_layers)


def main_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The main layers, in order: they run on [image, caption]."""
    return _transformer_blocks("layers", config.transformer.n_layers)


def modulated_blocks(config: ModelConfig) -> list[BlockPlace]:
    """The blocks whose norms the timestep modulates, in the order of the modulation table."""
    return [*noise_blocks(config), *main_blocks(config)]


def layer_blocks(component: str, config: ModelConfig) -> list[BlockPlace]:
    """The layers of `text_encoder` or `transformer`."""
    if component == "text_encoder":
        return text_blocks(config)
    return [*noise_blocks(config), *caption_blocks(config), *main_blocks(config)]


def _transformer_blocks(stem: str, count: int) -> list[BlockPlace]:
    return [BlockPlace(BlockKind.TRANSFORMER_BLOCK, f"{stem}.{index}") for index in range(count)]


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


@dataclass(frozen=True)
class Convolution:
    """A convolution of the autoencoder, with a bias; its weight is [out_channels, in_channels, side, side]."""

    name: str  # in its block
    out_channels: int
    in_channels: int
    side: int = 3  # of the kernel, in pixels
    stride: int = 1


NORM_BEFORE = {"conv1": "norm1", "conv2": "norm2", "conv_out": "conv_norm_out"}
"""The group norms of the autoencoder, each followed by SiLU, by the convolution that comes after it."""


def convolutions(place: BlockPlace) -> tuple[Convolution, ...]:
    """The convolutions of one block of the autoencoder, in order; a residual block's shortcut is the last."""
    channels, out = place.channels, place.out_channels
    match place.kind:
        case BlockKind.DECODER_IN | BlockKind.ENCODER_IN:
            return (Convolution("conv_in", out, channels),)
        case BlockKind.DECODER_OUT:
            return (Convolution("conv_out", out, channels),)
        case BlockKind.ENCODER_OUT:
            return (Convolution("conv_out", 2 * out, channels),)  # means, then logarithms of variances
        case BlockKind.UPSAMPLE:
            return (Convolution("conv", out, channels),)
        case BlockKind.DOWNSAMPLE:
            return (Convolution("conv", out, channels, stride=2),)
        case BlockKind.RESNET:
            both = Convolution("conv1", out, channels), Convolution("conv2", out, out)
            return both if channels == out else (*both, Convolution("conv_shortcut", out, channels, side=1))
        case _:
            return ()


def block_tiles(place: BlockPlace) -> list[BlockPlace]:
    """The 3 x 3 convolutions of one block of the decoder, which can run on tiles of maps that stay on the host."""
    return [
        BlockPlace(BlockKind.DECODER_TILE, place.tensor(c.name), c.in_channels, c.out_channels, place.out_scale)
        for c in convolutions(place)
        if c.side == 3
    ]


def is_normed(tile: BlockPlace) -> bool:
    """Whether a norm and SiLU come before a tile's convolution."""
    return tile.name.rpartition(".")[2] in NORM_BEFORE


CAPTION_EMBEDDER = BlockPlace(BlockKind.CAPTION_EMBEDDER)
IMAGE_EMBEDDER = BlockPlace(BlockKind.IMAGE_EMBEDDER)
FINAL_LAYER = BlockPlace(BlockKind.FINAL_LAYER)


def program_blocks(program: Program, config: ModelConfig) -> list[BlockPlace]:
    """The blocks that a program consists of, in order; the modulation program has none."""
    match program:
        case Program.TEXT_ENCODER:
            return text_blocks(config)
        case Program.CAPTION:
            return [CAPTION_EMBEDDER, *caption_blocks(config)]
        case Program.DENOISER:
            return [IMAGE_EMBEDDER, *modulated_blocks(config), FINAL_LAYER]
        case Program.DECODER:
            return decoder_blocks(config)
        case Program.ENCODER:
            return encoder_blocks(config)
        case _:
            return []


def all_blocks(config: ModelConfig) -> Iterator[BlockPlace]:
    """Every block of a model, then the tiles of the decoder's blocks."""
    for program in MODEL_PROGRAMS:
        places = program_blocks(program, config)
        yield from places
        if program is Program.DECODER:
            for place in places:
                yield from block_tiles(place)
