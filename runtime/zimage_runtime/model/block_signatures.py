"""Inputs and outputs of block programs, which take their weights as inputs: one program per block *shape*.

These names and shapes are stated here alone: the exporter builds programs with them, and the executor feeds programs by
them. Patching and padding are done on the host, so that no program's shapes depend on the values of another. Inputs and
outputs named here are float32 in every precision, except feature maps. Batch is 1. Every other input is a weight, named
as in its component without the block's own name (`layers.7.attention.to_q.weight` → `attention.to_q.weight`), or a
scalar that differs between layers, named by the same rule.
"""

from .blocks import BAND, MAP, MAP_OUT, TILE, TILE_OUT, BlockKind, BlockPlace
from .config import ModelConfig
from .programs import Signature

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
    # the negative velocity, in patches
    BlockKind.FINAL_LAYER: Signature(
        {"x": (1, "tokens", "dim"), "final_scale": ("dim",)}, {"patches": (1, "tokens", "patch_dim")}
    ),
    BlockKind.DECODER_IN: Signature({"latents": (1, "channels", "h", "w")}, {MAP_OUT: (1, "h", "w", "out_channels")}),
    BlockKind.RESNET: Signature({MAP: (1, "h", "w", "channels")}, {MAP_OUT: (1, "h", "w", "out_channels")}),
    # the whole map, and those of its positions for which attention is computed
    BlockKind.MIDDLE_ATTENTION: Signature(
        {MAP: (1, "h", "w", "channels"), BAND: (1, "queries", "channels")}, {MAP_OUT: (1, "queries", "channels")}
    ),
    BlockKind.UPSAMPLE: Signature({MAP: (1, "h", "w", "channels")}, {MAP_OUT: (1, "out_h", "out_w", "channels")}),
    BlockKind.DECODER_OUT: Signature({MAP: (1, "h", "w", "channels")}, {"image": (1, "out_channels", "h", "w")}),
    # rows of a map, with one more above and one below: `inside` is 0 for rows outside the map, otherwise 1
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

EXTENDED_KINDS = (
    BlockKind.CAPTION_EMBEDDER,
    BlockKind.TRANSFORMER_BLOCK,
    BlockKind.IMAGE_EMBEDDER,
    BlockKind.FINAL_LAYER,
)
"""The blocks whose programs come extended, too. Their LoRA are inputs, named as in `branches`, of one rank for all."""


def block_dims(place: BlockPlace, config: ModelConfig) -> dict[str, int]:
    """Values of the widths that its signature's shapes name. All other names are free dimensions."""
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
