"""The names that ComfyUI's files give to tensors, beside those of diffusers: one table, read in both directions.

ComfyUI joins the query, key and value projections of a layer to one tensor, by rows, in this order. It keeps the names
of the original autoencoder. That one counts the decoder's levels from the image, and diffusers counts them from the
latents. Its attention consists of convolutions over single pixels, which are linear layers in the same bytes.

Sources: ``convert_z_image_transformer_checkpoint_to_diffusers`` and ``convert_ldm_vae_checkpoint`` in diffusers'
``loaders/single_file_utils.py``.
"""

from collections.abc import Iterable
from typing import NamedTuple

from .linears import LAYER_LINEARS, PATCH

_TRANSFORMER = (  # diffusers, ComfyUI: whole parts of a name, between dots
    ("attention.to_out.0", "attention.out"),
    ("attention.norm_q", "attention.q_norm"),
    ("attention.norm_k", "attention.k_norm"),
    (f"all_x_embedder.{PATCH}", "x_embedder"),
    (f"all_final_layer.{PATCH}", "final_layer"),
)
_VAE_MIDDLE = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
)
_VAE_LEVELS = (
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("encoder.conv_norm_out", "encoder.norm_out"),
    ("decoder.conv_norm_out", "decoder.norm_out"),
)

_LAYER = LAYER_LINEARS["transformer"]
_PROJECTIONS = tuple(f".{name}.weight" for name in (_LAYER.query, _LAYER.key, _LAYER.value))
_FUSED = ".attention.qkv.weight"

_TEXT_PREFIX = "model."
_TEXT_STEMS = (_TEXT_PREFIX, "lm_head.")


class Rows(NamedTuple):
    """Where a tensor lies in a ComfyUI file: one of several equal ranges of a tensor's rows."""

    name: str
    part: int = 0
    parts: int = 1


def to_comfyui(component: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """ComfyUI's names for a component's tensors, each with diffusers' names of what its rows consist of, in order.

    A fused projection names all three of its parts, whichever of them are among `names`.
    """
    names = list(names)
    table = _table(component, _levels(names, "encoder.down_blocks"))
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        if component == "text_encoder":
            found[name if name.startswith(_TEXT_STEMS) else f"{_TEXT_PREFIX}{name}"] = (name,)
        elif component == "transformer" and (end := next((p for p in _PROJECTIONS if name.endswith(p)), None)):
            layer = name.removesuffix(end)
            found[f"{layer}{_FUSED}"] = tuple(f"{layer}{projection}" for projection in _PROJECTIONS)
        else:
            found[_renamed(name, table)] = (name,)
    return found


def from_comfyui(component: str, names: Iterable[str]) -> dict[str, Rows]:
    """diffusers' names for the tensors of a component's ComfyUI file, each with its place in that file.

    Names that are diffusers' own are kept. Those of the text encoder are the same in both.
    """
    names = list(names)
    table = [(theirs, ours) for ours, theirs in _table(component, _levels(names, "encoder.down"))]
    found: dict[str, Rows] = {}
    for name in names:
        if component == "transformer" and name.endswith(_FUSED):
            layer = name.removesuffix(_FUSED)
            for part, projection in enumerate(_PROJECTIONS):
                found[f"{layer}{projection}"] = Rows(name, part, len(_PROJECTIONS))
        else:
            found[_renamed(name, table)] = Rows(name)
    return found


def is_pixelwise(component: str, name: str) -> bool:
    """Whether a linear's weight, by diffusers' name, is a convolution over single pixels: [out, in, 1, 1]."""
    return component == "vae" and ".attentions." in name and ".to_" in name and name.endswith(".weight")


def _table(component: str, levels: int) -> list[tuple[str, str]]:
    if component == "transformer":
        return list(_TRANSFORMER)
    if component == "text_encoder":
        return []
    numbered = [(f"encoder.down_blocks.{level}", f"encoder.down.{level}") for level in range(levels)]
    numbered += [(f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}") for level in range(levels)]
    return [*_VAE_MIDDLE, *numbered, *_VAE_LEVELS]


def _levels(names: Iterable[str], stem: str) -> int:
    """How many different numbers follow a stem."""
    start = f"{stem}."
    return len({name[len(start) :].partition(".")[0] for name in names if name.startswith(start)})


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    dotted = f".{name}"
    for old, new in table:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:]
