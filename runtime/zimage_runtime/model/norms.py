"""The norms of the model: their names, widths and epsilons, block by block. They are listed here alone."""

from dataclasses import dataclass, replace
from enum import StrEnum

from .blocks import NORM_BEFORE, NORMS, BlockKind, BlockPlace, convolutions
from .config import BlockDims, ModelConfig
from .linears import PATCH

_HEAD_EPSILON = 1e-5  # of the transformer's queries and keys; fixed in diffusers, independent of norm_eps
_FINAL_EPSILON = 1e-6
_GROUP_EPSILON = 1e-6


class NormKind(StrEnum):
    """What is measured, and which parameters there are."""

    RMS = "rms"  # root mean square; a weight
    LAYER = "layer"  # mean and variance; no parameters
    GROUP = "group"  # mean and variance of groups of channels; a weight and a bias


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis, or over groups of channels."""

    name: str  # in its block
    width: int
    epsilon: float
    kind: NormKind = NormKind.RMS
    groups: int = 1

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return f"{self.name}.weight"

    def within(self, scope: str) -> "Norm":
        """The same norm, named in a scope of its block."""
        return replace(self, name=self.name.removeprefix(f"{scope}."))


@dataclass(frozen=True)
class LayerNorms:
    """The norms of one layer of the text encoder or the transformer, by what they do."""

    attention: Norm  # before attention
    query: Norm  # of each head
    key: Norm
    ffn: Norm  # before SwiGLU
    branches: tuple[Norm, ...] = ()  # after attention and after SwiGLU: the transformer's alone


ATTENTION_NORM = {"text_encoder": "input_layernorm", "transformer": NORMS[0]}
FFN_NORM = {"text_encoder": "post_attention_layernorm", "transformer": NORMS[2]}
"""The norms whose results a layer's linears read, by component."""


def layer_norms(component: str, config: ModelConfig) -> LayerNorms:
    """The norms of one layer of `text_encoder` or `transformer`."""
    if component == "transformer":
        return transformer_norms(config.transformer)
    text = config.text_encoder
    attention, ffn, width, epsilon = ATTENTION_NORM[component], FFN_NORM[component], text.hidden_size, text.rms_norm_eps
    query, key = (Norm(f"self_attn.{kind}_norm", text.head_dim, epsilon) for kind in "qk")
    return LayerNorms(Norm(attention, width, epsilon), query, key, Norm(ffn, width, epsilon))


def transformer_norms(dims: BlockDims) -> LayerNorms:
    """The norms of a block of the transformer, or of a ControlNet."""
    attention, ffn, width, epsilon = NORMS[0], NORMS[2], dims.dim, dims.norm_eps
    query, key = (Norm(f"attention.norm_{kind}", dims.head_dim, _HEAD_EPSILON) for kind in "qk")
    branches = tuple(Norm(name, width, epsilon) for name in (NORMS[1], NORMS[3]))
    return LayerNorms(Norm(attention, width, epsilon), query, key, Norm(ffn, width, epsilon), branches)


def block_norms(place: BlockPlace, config: ModelConfig) -> tuple[Norm, ...]:
    """The norms of one block."""
    c = config.transformer
    match place.kind:
        case BlockKind.TEXT_LAYER | BlockKind.TRANSFORMER_BLOCK:
            norms = layer_norms(place.kind.component, config)
            return (norms.attention, norms.query, norms.key, norms.ffn, *norms.branches)
        case BlockKind.CAPTION_EMBEDDER:
            return (Norm("cap_embedder.0", c.cap_feat_dim, c.norm_eps),)
        case BlockKind.FINAL_LAYER:
            return (Norm(f"all_final_layer.{PATCH}.norm_final", c.dim, _FINAL_EPSILON, NormKind.LAYER),)
        case BlockKind.MIDDLE_ATTENTION:
            return (_group_norm("group_norm", place.channels, config),)
        case _:
            return tuple(
                _group_norm(NORM_BEFORE[c.name], c.in_channels, config)
                for c in convolutions(place)
                if c.name in NORM_BEFORE
            )


def _group_norm(name: str, width: int, config: ModelConfig) -> Norm:
    return Norm(name, width, _GROUP_EPSILON, NormKind.GROUP, config.vae.norm_num_groups)
