"""A block of the transformer, and what surrounds blocks: patches, pads, rotary tables, modulation.

The model's own programs consist of such blocks, and so do those of a ControlNet.
"""

from dataclasses import dataclass
from typing import NamedTuple

from zimage_runtime.model.blocks import NORMS
from zimage_runtime.model.config import PATCH_SIZE, BlockDims
from zimage_runtime.model.linears import Linear, transformer_linears
from zimage_runtime.model.norms import transformer_norms

from ..storage.folds import BlockFold
from .builder import GraphBuilder
from .layers import Layers
from .target import Target


class Norms(NamedTuple):
    """What the four norms of a block multiply by, [dim] each."""

    attention_in: str
    attention_out: str
    ffn_in: str
    ffn_out: str


class Tables(NamedTuple):
    """Rotary tables of a sequence, [batch, tokens, head_dim / 2]."""

    cos: str
    sin: str


@dataclass(frozen=True)
class BlockGraphs:
    """States blocks of given dimensions."""

    dims: BlockDims
    target: Target

    def norms(self, b: GraphBuilder) -> Norms:
        """A block's own norms, which no timestep changes."""
        return Norms(*(b.weight(f"{name}.weight", (self.dims.dim,)) for name in NORMS))

    def modulation(self, layers: Layers, embedding: str, block: str, linear: Linear) -> str:
        """[steps, 1, 4, dim]: 1 + scale and tanh(gate), each times its norm's weight."""
        b = layers.b
        with b.scope(block):
            x = layers.linear(embedding, linear.within(block))
            parts = b.ops("Split", x, name="split", outputs=4, axis=1, num_outputs=4)
            rows = []
            for part, norm in zip(parts, NORMS, strict=True):
                if norm.endswith("1"):
                    factor = b.op("Add", part, b.number(1.0), name=f"{norm}.scale")
                else:
                    factor = b.op("Tanh", part, name=f"{norm}.gate")
                row = b.op("Mul", factor, b.weight(f"{norm}.weight", (self.dims.dim,)), name=norm)
                rows.append(b.op("Unsqueeze", row, b.integers(1, 2), name=f"{norm}.row"))
            return b.op("Concat", *rows, name="modulation", axis=2)

    def block(self, layers: Layers, x: str, shape: str, norms: Norms, tables: Tables, fold: BlockFold) -> str:
        """One block; its weights are named by the builder's scope."""
        linears, scope = transformer_linears(self.dims), "feed_forward"
        epsilon = self.dims.norm_eps
        h = layers.rms_norm(x, norms.attention_in, epsilon, "attention_norm1")
        with layers.b.scope("attention"):
            h = self._attention(layers, layers.rows(h, linears.query.in_width), shape, tables)
        h = layers.branch_norm(h, norms.attention_out, epsilon, fold.attention, "attention_norm2")
        x = layers.residual(x, layers.reshape(h, shape, "attention_update"), "attention_residual")
        h = layers.rms_norm(x, norms.ffn_in, epsilon, "ffn_norm1")
        with layers.b.scope(scope):
            gate, up, down = (linear.within(scope) for linear in (linears.gate, linears.up, linears.down))
            h = layers.gated(layers.rows(h, gate.in_width), gate, up, down, -fold.product)
        h = layers.branch_norm(h, norms.ffn_out, epsilon, fold.ffn + fold.product, "ffn_norm2")
        return layers.residual(x, layers.reshape(h, shape, "ffn_update"), "ffn_residual")

    def _attention(self, layers: Layers, x: str, shape: str, tables: Tables) -> str:
        dims, scope = self.dims, "attention"
        linears, norms = transformer_linears(dims), transformer_norms(dims)
        rotated = []
        inputs = [linear.within(scope) for linear in (linears.query, linears.key, linears.value)]
        values = layers.linears(x, inputs, "qkv")
        for kind, norm in (("q", norms.query), ("k", norms.key)):
            h = layers.head_norm(next(values), norm.within(scope))
            h = layers.reshape(h, shape, f"{kind}.tokens")
            rotated.append(layers.rotary(h, tables.cos, tables.sin, dims.n_heads, f"{kind}.rotary", interleaved=True))
        v = layers.reshape(next(values), shape, "v.tokens")
        h = layers.attention(rotated[0], rotated[1], v, dims.n_heads, dims.head_dim)
        return layers.linear(layers.rows(h, dims.dim), linears.out.within(scope))


def norm_rows(layers: Layers, table: str, blocks: int, dim: int) -> list[Norms]:
    """A modulation table's rows, by block, as [dim] vectors of a few kilobytes."""
    rows = layers.table_rows(table, 4 * blocks, dim, "modulation")
    return [Norms(*rows[start : start + 4]) for start in range(0, 4 * blocks, 4)]


def tables_of_images(b: GraphBuilder, cos: str, sin: str, batch: str, name: str) -> Tables:
    """Rotary tables [1, tokens, head_dim / 2] for each image of a batch."""
    per_image = b.op("Concat", batch, b.integers(1, 1), name=f"{name}.per_image", axis=0)
    return Tables(*(b.op("Expand", table, per_image, name=f"{name}.{table}.each") for table in (cos, sin)))


def with_caption(b: GraphBuilder, x: str, batch: str, name: str = "unified") -> str:
    """Image tokens followed by the caption's, which all images of a batch share."""
    caption = b.op(
        "Expand",
        "caption",
        b.op("Concat", batch, b.integers(1, 1), name="per_image", axis=0),
        name="captions",
    )
    return b.op("Concat", x, caption, name=name, axis=1)


def patchify(b: GraphBuilder, batch: str, channels: int) -> tuple[str, tuple[str, str]]:
    """The input `latents` [batch, channels, 2 rows, 2 columns] → patches [..., patch_dim], and the grid's sides."""
    two = b.integers(PATCH_SIZE)
    rows = b.op("Div", b.dim("latents", 2, "latent_h"), two, name="rows")
    columns = b.op("Div", b.dim("latents", 3, "latent_w"), two, name="columns")
    shape = b.op("Concat", batch, b.integers(channels), rows, two, columns, two, name="patchify.shape", axis=0)
    x = b.op("Reshape", "latents", shape, name="patchify.split")
    return b.op("Transpose", x, name="patchify", perm=[0, 2, 4, 3, 5, 1]), (rows, columns)


def pad(b: GraphBuilder, x: str, token: str, table: str, name: str, dim: int, batch: str | None = None) -> str:
    """Appends the learned pad token until the sequence is as long as its rotary table."""
    with b.scope(name):
        missing = b.op("Sub", b.dim(table, 1, "padded"), b.dim(x, 1, "count"), name="missing")
        shape = b.op("Concat", batch or b.integers(1), missing, b.integers(dim), name="shape", axis=0)
        return b.op("Concat", x, b.op("Expand", token, shape, name="tokens"), name="padded_tokens", axis=1)
