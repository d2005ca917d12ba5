"""The decoder where its maps do not fit the budget: its first blocks on whole maps, the others in tiles.

From the first block that is tiled, maps stay in the host's memory, in float32. Each of its convolutions runs on the
device, a tile at a time, exactly as in `tiling`: norms have the statistics of the whole map. The device then holds one
layer's weights and one tile, whatever the size of the image. The attention of a middle block that is tiled runs on the
host.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from ...model.blocks import TILE, TILE_OUT, BlockPlace, block_tiles, decoder_blocks, is_normed
from ...model.config import ModelConfig
from ...tiles.tiling import tile_rows
from .block_catalog import VariantSpec
from .stage_sizes import (
    ImageSizes,
    StageNeeds,
    TileShape,
    block_layout,
    map_buffers,
    map_scratch,
    maps_between,
    needs_of,
)

TILE_VALUES = 1 << 23
"""Values of a tile, all channels together: 34 MB in float32. The device holds one tile and its result."""

_FLOAT = 4  # bytes

TILES_ON_HOST = 4 * TILE_VALUES * _FLOAT
"""Bytes of tiles in the host's memory: two in pinned memory, one per direction, and the arrays of `tiling`."""


def tiled_decoder(spec: VariantSpec, config: ModelConfig, sizes: ImageSizes, whole: int) -> StageNeeds | None:
    """The decoder's needs with its first `whole` blocks on whole maps; None where an engine cannot run such maps."""
    blocks = decoder_blocks(config)
    head, rest = blocks[:whole], blocks[whole:]
    tiles = tuple(_tile_shape(tile, sizes) for place in rest for tile in block_tiles(place))
    if not takes_maps(spec, head, sizes) or not all(_takes(spec, tile) for tile in tiles):
        return None
    maps = maps_between(blocks, sizes.latent_height, sizes.latent_width)[:whole]
    programs = [spec.program_of(tile.place) for tile in tiles]
    layouts = [block_layout(p, tile.place) for p, tile in zip(programs, tiles, strict=True)]
    widest = max(tile.place.channels for tile in tiles) * _FLOAT
    buffers = {
        "latents": sizes.latent_height * sizes.latent_width * config.vae.latent_channels * _FLOAT if head else 0,
        **map_buffers(spec, head, maps),
        TILE: max(_FLOAT * math.prod(tile.shapes[TILE]) for tile in tiles),
        TILE_OUT: max(_FLOAT * math.prod(tile.out_shape) for tile in tiles),
        "layer": max(layout.nbytes for layout in layouts),
        "factor": widest,
        "summand": widest,
        "inside": max(tile.rows for tile in tiles) * _FLOAT,
    }
    scratch = map_scratch(spec, head, sizes)
    scratch += [p.scratch_bytes(tile.rows * tile.columns) for p, tile in zip(programs, tiles, strict=True)]
    return replace(needs_of(spec, head, [], buffers, {}, max(scratch)), tiles=tiles)


def takes_maps(spec: VariantSpec, blocks: Sequence[BlockPlace], sizes: ImageSizes) -> bool:
    """Whether these blocks' engines can run whole maps of an image."""
    height, width = sizes.latent_height, sizes.latent_width
    return all(spec.program_of(b).takes(height * b.scale, width * b.scale) for b in blocks)


def _tile_shape(tile: BlockPlace, sizes: ImageSizes) -> TileShape:
    height, width = sizes.latent_height * tile.scale, sizes.latent_width * tile.scale
    rows = min(tile_rows(max(tile.channels, tile.out_channels), width, TILE_VALUES), height)
    return TileShape(tile, rows + 2, width if is_normed(tile) else width + 2)


def _takes(spec: VariantSpec, tile: TileShape) -> bool:
    return spec.program_of(tile.place).takes(tile.rows, tile.columns)
