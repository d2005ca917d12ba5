"""The stages that take turns on the device: their blocks, and the memory that an image needs in each.

All sizes are computed here: the plan adds them up, and the executor allocates exactly these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...model.blocks import (
    CAPTION_EMBEDDER,
    FINAL_LAYER,
    IMAGE_EMBEDDER,
    NORMS,
    TILE,
    BlockKind,
    BlockPlace,
    caption_blocks,
    decoder_blocks,
    encoder_blocks,
    main_blocks,
    noise_blocks,
    text_blocks,
)
from ...model.config import ModelConfig
from ...model.geometry import ImageGeometry, padded
from ...model.programs import Program
from .block_catalog import ProgramSpec, VariantSpec, aligned

_FLOAT = 4  # bytes

TEXT_STEP = 64
"""Prompts are padded to a multiple of this for the text encoder. Its attention is causal, so what follows a token does
not change it, and TensorRT compiles kernels for 8 lengths instead of 512."""

BAND_POSITIONS = 2048
"""Positions of the middle block's map whose attention is computed at a time. Their scores are 67 MB for 1024 x 1024
pixels and 268 MB for 2048 x 2048, in 16 bits. Keys and values are computed again for each band, which at 1024 x 1024 is
an eighth more work. A band begins at a multiple of 256 bytes, whatever the width."""

STAGES = (Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER, Program.DECODER, Program.ENCODER)
"""The stages on the device. Modulation always runs on the CPU."""


@dataclass(frozen=True)
class ImageSizes:
    """Everything that the sizes of an image's buffers depend on."""

    prompt_tokens: int
    image_count: int  # image tokens without pads
    image_tokens: int
    latent_height: int
    latent_width: int
    images: int = 1  # in a batch
    conditionings: int = 1  # prompts that take turns at a step
    rank: int = 0  # of LoRA's branches; 0 where there are none

    @property
    def caption_tokens(self) -> int:
        """The prompt's tokens with their pads."""
        return padded(self.prompt_tokens)

    @property
    def text_tokens(self) -> int:
        """The prompt's tokens as the text encoder gets them."""
        return text_length(self.prompt_tokens)

    @property
    def tokens(self) -> int:
        """Tokens of the sequence [image, caption]."""
        return self.image_tokens + self.caption_tokens

    @classmethod
    def of(
        cls, geometry: ImageGeometry, prompt_tokens: int, images: int = 1, conditionings: int = 1, rank: int = 0
    ) -> "ImageSizes":
        """The sizes of an image, and of the longest of its prompts."""
        return cls(
            prompt_tokens,
            geometry.rows * geometry.columns,
            geometry.image_tokens,
            geometry.latent_height,
            geometry.latent_width,
            images,
            conditionings,
            rank,
        )


def text_length(tokens: int) -> int:
    """The length that a prompt is padded to for the text encoder."""
    return -(-tokens // TEXT_STEP) * TEXT_STEP


@dataclass(frozen=True)
class BlockLayout:
    """Where a block's weights and scalars lie in its buffer, in bytes from its start."""

    offsets: Mapping[str, int]
    nbytes: int


def block_layout(spec: ProgramSpec, place: BlockPlace) -> BlockLayout:
    """The buffer of one block. Norms that come from the modulation table are not in it."""
    offsets, end = {}, 0
    for name, weight in spec.weights.items():
        if is_modulated(place) and name.removesuffix(".weight") in NORMS:
            continue
        offsets[name] = end
        end += aligned(weight.nbytes)
    for name in spec.scalars:
        offsets[name] = end
        end += aligned(_FLOAT)
    return BlockLayout(offsets, end)


def branch_layout(spec: ProgramSpec, rank: int) -> BlockLayout:
    """The buffer of one block's LoRA."""
    offsets, end = {}, 0
    for name, branch in spec.branches.items():
        offsets[name] = end
        end += aligned(math.prod(size or rank for size in branch.shape) * branch.dtype.size)
    return BlockLayout(offsets, end)


def is_modulated(place: BlockPlace) -> bool:
    """Whether the block's norms depend on the timestep."""
    return place.kind is BlockKind.TRANSFORMER_BLOCK and not place.name.startswith("context_refiner")


@dataclass(frozen=True)
class TileShape:
    """The tiles that a convolution of the decoder runs on, where maps stay on the host."""

    place: BlockPlace
    rows: int  # with one more above and one below
    columns: int  # with one more on each side if there is no norm before the convolution

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its program's inputs with free dimensions."""
        return {TILE: (1, self.place.channels, self.rows, self.columns), "inside": (1, 1, self.rows, 1)}

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of its output."""
        return (1, self.place.out_channels, self.rows - 2, self.columns)


@dataclass(frozen=True)
class StageNeeds:
    """What one stage needs on the device. All sizes are in bytes."""

    blocks: tuple[BlockPlace, ...]  # in the order in which they run; these may be streamed
    block_bytes: tuple[int, ...]
    ends: tuple[BlockPlace, ...]  # always resident
    end_bytes: tuple[int, ...]
    buffers: Mapping[str, int]  # by name; one of each
    image_buffers: Mapping[str, int]  # by name; one for each image of a batch when blocks are streamed
    scratch: int  # shared by all engines
    tiles: tuple[TileShape, ...] = ()  # the layers after the blocks, which run a tile at a time
    rank: int = 0  # of LoRA's branches, whose matrices are in the buffer `lora`; 0 where the stage takes none

    def fixed(self, images: int) -> int:
        """Everything but the blocks' weights, with buffers for `images` images at once."""
        once = sum(map(aligned, self.buffers.values())) + sum(self.end_bytes) + aligned(self.scratch)
        return once + images * sum(map(aligned, self.image_buffers.values()))


def stage_needs(program: Program, spec: VariantSpec, config: ModelConfig, sizes: ImageSizes) -> StageNeeds:
    """What a stage needs for an image."""
    return _STAGES[program](spec, config, sizes)


def needs_of(
    spec: VariantSpec,
    blocks: list[BlockPlace],
    ends: list[BlockPlace],
    buffers: Mapping[str, int],
    image_buffers: Mapping[str, int],
    scratch: int,
    rank: int = 0,
) -> StageNeeds:
    """What a stage without tiles needs."""
    sizes = [tuple(block_layout(spec.program_of(place), place).nbytes for place in places) for places in (blocks, ends)]
    if rank:
        programs = [spec.program_of(place, lora=True) for place in (*blocks, *ends)]
        buffers = {**buffers, "lora": sum(branch_layout(program, rank).nbytes for program in programs)}
    return StageNeeds(tuple(blocks), sizes[0], tuple(ends), sizes[1], buffers, image_buffers, scratch, rank=rank)


def _text(spec: VariantSpec, config: ModelConfig, sizes: ImageSizes) -> StageNeeds:
    blocks, text, tokens = text_blocks(config), config.text_encoder, sizes.text_tokens
    hidden, table = tokens * text.hidden_size * _FLOAT, tokens * text.head_dim // 2 * _FLOAT
    buffers = {"x": hidden, "y": hidden, "cos": table, "sin": table}
    scratch = max(spec.program_of(place).scratch_bytes(tokens) for place in blocks)
    return needs_of(spec, blocks, [], buffers, {}, scratch)


def _caption(spec: VariantSpec, config: ModelConfig, sizes: ImageSizes) -> StageNeeds:
    blocks, c = caption_blocks(config), config.transformer
    values, table = sizes.caption_tokens * c.dim * _FLOAT, sizes.caption_tokens * c.head_dim // 2 * _FLOAT
    buffers = {
        "hidden": sizes.caption_tokens * c.cap_feat_dim * _FLOAT,
        "x": values,
        "y": values,
        "cos": table,
        "sin": table,
    }
    programs = [spec.program_of(place, lora=bool(sizes.rank)) for place in (CAPTION_EMBEDDER, *blocks)]
    scratch = max(program.scratch_bytes(sizes.caption_tokens) for program in programs)
    return needs_of(spec, blocks, [CAPTION_EMBEDDER], buffers, {}, scratch, sizes.rank)


def row_bytes(config: ModelConfig) -> int:
    """Bytes of a row of the modulation table on the device."""
    return aligned(config.transformer.dim * _FLOAT)


def _denoiser(spec: VariantSpec, config: ModelConfig, sizes: ImageSizes) -> StageNeeds:
    blocks, c = noise_blocks(config) + main_blocks(config), config.transformer
    table = sizes.tokens * c.head_dim // 2 * _FLOAT
    buffers = {
        "pads": (sizes.image_tokens - sizes.image_count) * c.dim * _FLOAT,
        "modulation": (len(NORMS) * c.modulated_blocks + 1) * row_bytes(config),  # and the final scale
    }
    for slot in range(sizes.conditionings):
        caption = sizes.caption_tokens * c.dim * _FLOAT
        buffers |= {f"caption.{slot}": caption, f"cos.{slot}": table, f"sin.{slot}": table}
    values, patches = sizes.tokens * c.dim * _FLOAT, sizes.image_count * c.patch_dim * _FLOAT
    image_buffers = {"x": values, "y": values, "patches": patches, "velocity": patches}
    ends, lora = [IMAGE_EMBEDDER, FINAL_LAYER], bool(sizes.rank)
    scratch = max(
        *(spec.program_of(place, lora=lora).scratch_bytes(sizes.image_count) for place in ends),
        *(spec.program_of(place, lora=lora).scratch_bytes(sizes.tokens) for place in blocks),
    )
    return needs_of(spec, blocks, ends, buffers, image_buffers, scratch, sizes.rank)


Map = tuple[int, int, int]
"""Rows, columns and channels of a feature map."""


def maps_between(blocks: Sequence[BlockPlace], latent_height: int, latent_width: int) -> list[Map]:
    """The maps that are the output of each block of the autoencoder but the last."""
    return [(latent_height * b.scale, latent_width * b.scale, b.channels) for b in blocks[1:]]


def bands(rows: int, columns: int) -> list[tuple[int, int]]:
    """The first position of each band of a map, and how many there are in it."""
    count = rows * columns
    return [(first, min(BAND_POSITIONS, count - first)) for first in range(0, count, BAND_POSITIONS)]


def map_scratch(spec: VariantSpec, blocks: Sequence[BlockPlace], sizes: ImageSizes) -> list[int]:
    """Bytes of scratch memory that each block of the autoencoder needs."""
    positions = sizes.latent_height * sizes.latent_width
    return [spec.program_of(b).scratch_bytes(positions * b.scale**2) for b in blocks]


def map_buffers(spec: VariantSpec, blocks: list[BlockPlace], maps: list[Map]) -> dict[str, int]:
    """Bytes of the two buffers in which the maps take turns."""
    element = spec.program_of(blocks[0]).map_dtype.size if blocks else 0
    sizes = [rows * columns * channels * element for rows, columns, channels in maps]
    return {"even": max(sizes[::2], default=0), "odd": max(sizes[1::2], default=0)}


def _decoder(spec: VariantSpec, config: ModelConfig, sizes: ImageSizes) -> StageNeeds:
    blocks, positions = decoder_blocks(config), sizes.latent_height * sizes.latent_width
    maps = maps_between(blocks, sizes.latent_height, sizes.latent_width)
    buffers = {
        "latents": positions * config.vae.latent_channels * _FLOAT,
        "image": positions * config.vae.scale**2 * config.vae.out_channels * _FLOAT,
        **map_buffers(spec, blocks, maps),
    }
    scratch = max(map_scratch(spec, blocks, sizes))
    return needs_of(spec, blocks, [], buffers, {}, scratch)


def _encoder(spec: VariantSpec, config: ModelConfig, sizes: ImageSizes) -> StageNeeds:
    blocks, positions = encoder_blocks(config), sizes.latent_height * sizes.latent_width
    maps = maps_between(blocks, sizes.latent_height, sizes.latent_width)
    moments = positions * config.vae.latent_channels * _FLOAT
    buffers = {
        "image": positions * config.vae.scale**2 * config.vae.in_channels * _FLOAT,
        "mean": moments,
        "logvar": moments,
        **map_buffers(spec, blocks, maps),
    }
    scratch = max(map_scratch(spec, blocks, sizes))
    return needs_of(spec, blocks, [], buffers, {}, scratch)


_STAGES = {
    Program.TEXT_ENCODER: _text,
    Program.CAPTION: _caption,
    Program.DENOISER: _denoiser,
    Program.DECODER: _decoder,
    Program.ENCODER: _encoder,
}
