"""The linear layers of the model: their names and shapes, block by block. They are listed here alone.

Layers of the text encoder and of the transformer consist of the same seven linears under different names. `LayerRoles`
names them by what they do, for folding, rebalancing, quantizing and counting.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from .blocks import BlockKind, BlockPlace, modulated_blocks
from .config import PATCH_SIZE, BlockDims, ModelConfig

T = TypeVar("T")

PATCH = f"{PATCH_SIZE}-1"
"""How diffusers names the embedder and the final layer of patches of 2 x 2 latents in one frame."""

EMBEDDINGS = "embed_tokens.weight"
"""The text encoder's token embeddings, [vocab_size, hidden_size]: a table whose rows are looked up, not a linear."""

TIMESTEP_FREQUENCIES = 128
"""Of the timestep's sinusoidal embedding, each with a cosine and a sine."""

_TIMESTEP_HIDDEN = 1024


@dataclass(frozen=True)
class Linear:
    """A linear layer, whose weight is published as [out_width, in_width]."""

    name: str  # in its block
    out_width: int
    in_width: int
    bias: bool = False

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return f"{self.name}.weight"

    @property
    def parameters(self) -> int:
        """Elements of its weight."""
        return self.out_width * self.in_width

    def within(self, scope: str) -> "Linear":
        """The same layer, named in a scope of its block: `attention.to_q` is `to_q` within `attention`."""
        return replace(self, name=self.name.removeprefix(f"{scope}."))


@dataclass(frozen=True)
class LayerRoles(Generic[T]):
    """One value for each linear of a layer, by what the linear does."""

    query: T
    key: T
    value: T
    out: T  # reads the output of attention
    gate: T
    up: T
    down: T  # reads silu(gate) * up

    def __iter__(self) -> Iterator[T]:
        yield from (self.query, self.key, self.value, self.out, self.gate, self.up, self.down)


LAYER_LINEARS = {
    "text_encoder": LayerRoles(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    "transformer": LayerRoles(
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w3",
        "feed_forward.w2",
    ),
}
"""The names of a layer's linears in its block, by component."""


def layer_linears(component: str, config: ModelConfig) -> LayerRoles[Linear]:
    """The linears of one layer of `text_encoder` or `transformer`, of which all layers of the component consist."""
    if component == "transformer":
        return transformer_linears(config.transformer)
    text = config.text_encoder
    heads, shared = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    return _roles(LAYER_LINEARS[component], text.hidden_size, text.intermediate_size, heads, shared)


def transformer_linears(dims: BlockDims) -> LayerRoles[Linear]:
    """The linears of a block of the transformer, or of a ControlNet."""
    return _roles(LAYER_LINEARS["transformer"], dims.dim, dims.ffn_dim, dims.dim, dims.dim)


def _roles(names: LayerRoles[str], width: int, inner: int, heads: int, shared: int) -> LayerRoles[Linear]:
    return LayerRoles(
        query=Linear(names.query, heads, width),
        key=Linear(names.key, shared, width),
        value=Linear(names.value, shared, width),
        out=Linear(names.out, width, heads),
        gate=Linear(names.gate, inner, width),
        up=Linear(names.up, inner, width),
        down=Linear(names.down, width, inner),
    )


def block_linears(place: BlockPlace, config: ModelConfig) -> tuple[Linear, ...]:
    """The linears of one block, without those that compute its modulation (see `modulation_linears`)."""
    c, width = config.transformer, place.channels
    match place.kind:
        case BlockKind.TEXT_LAYER | BlockKind.TRANSFORMER_BLOCK:
            return tuple(layer_linears(place.kind.component, config))
        case BlockKind.CAPTION_EMBEDDER:
            return (Linear("cap_embedder.1", c.dim, c.cap_feat_dim, bias=True),)
        case BlockKind.IMAGE_EMBEDDER:
            return (Linear(f"all_x_embedder.{PATCH}", c.dim, c.patch_dim, bias=True),)
        case BlockKind.FINAL_LAYER:
            return (Linear(f"all_final_layer.{PATCH}.linear", c.patch_dim, c.dim, bias=True),)
        case BlockKind.MIDDLE_ATTENTION:
            return tuple(Linear(name, width, width, bias=True) for name in ("to_q", "to_k", "to_v", "to_out.0"))
        case _:
            return ()


@dataclass(frozen=True)
class ModulationLinears:
    """The linears of the modulation program, under their names in the component."""

    hidden: Linear  # two for the timestep
    embedding: Linear
    blocks: tuple[Linear, ...]  # one for each row of the modulation table: four factors per channel
    final: Linear


def modulation_linears(config: ModelConfig) -> ModulationLinears:
    """What turns timesteps into the modulation table."""
    dim, width = config.transformer.dim, config.transformer.adaln_dim
    return ModulationLinears(
        Linear("t_embedder.mlp.0", _TIMESTEP_HIDDEN, 2 * TIMESTEP_FREQUENCIES, bias=True),
        Linear("t_embedder.mlp.2", width, _TIMESTEP_HIDDEN, bias=True),
        tuple(
            Linear(place.tensor("adaLN_modulation.0"), 4 * dim, width, bias=True) for place in modulated_blocks(config)
        ),
        Linear(f"all_final_layer.{PATCH}.adaLN_modulation.1", dim, width, bias=True),
    )
