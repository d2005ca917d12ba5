"""The diffusion transformer as three programs: caption (once a prompt), modulation (once a schedule), denoiser.

Architecture (``transformer_z_image.py`` in diffusers). A block is attention, then SwiGLU; each sits between two
RMS norms, of which the second is on the branch's output, before it is added to the residual stream. The timestep
scales the first norm's output and gates the second's. Both are factors per channel, as the norm's weight is, so
the modulation program multiplies them into the weights and a block has nothing left but four norms.
Queries and keys are normalized per head; rotary embedding is interleaved; pads are attended to, there is no mask.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from zimage_runtime.model.config import PATCH_SIZE, TransformerConfig
from zimage_runtime.model.programs import Program

from ..storage.folds import BlockFold
from .builder import Graph, GraphBuilder
from .layers import Layers
from .target import Target

_QK_NORM_EPS = 1e-5  # fixed in diffusers, whatever norm_eps is
_FINAL_NORM_EPS = 1e-6
_FREQUENCIES = 128  # of the timestep embedding
_TIMESTEP_HIDDEN = 1024
_PATCH = f"{PATCH_SIZE}-1"


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
class TransformerGraphs:
    """Builds the transformer's programs from its configuration."""

    config: TransformerConfig
    target: Target

    def build(self) -> list[Graph]:
        """Caption, modulation and denoiser."""
        return [self.caption(), self.modulation(), self.denoiser()]

    def _builder(self, program: Program) -> GraphBuilder:
        c = self.config
        return self.target.builder(
            program,
            {
                "dim": c.dim,
                "hidden_size": c.cap_feat_dim,
                "half_head": c.head_dim // 2,
                "in_channels": c.in_channels,
                "blocks": c.modulated_blocks,
            },
        )

    def caption(self) -> Graph:
        """Hidden states → caption tokens: norm, linear, pads, context refiners."""
        c, b = self.config, self._builder(Program.CAPTION)
        layers = self.target.layers(b)
        x = layers.reshape(self.embed_caption(layers), b.integers(1, -1, c.dim), "cap_embedder.tokens")
        x = self._pad(b, x, b.weight("cap_pad_token", (1, c.dim)), "cos", "cap_pad")
        shape = b.op("Shape", x, name="shape")
        for index in range(c.n_refiner_layers):
            block = f"context_refiner.{index}"
            fold = self.target.fold("transformer", block)
            with b.scope(block):
                x = self.block(layers, x, shape, self.norms(b), Tables("cos", "sin"), fold)
        b.output(x, "caption")
        return b.build()

    def embed_caption(self, layers: Layers) -> str:
        """Hidden states → [tokens, dim]."""
        c, b = self.config, layers.b
        scale = b.weight("cap_embedder.0.weight", (c.cap_feat_dim,))
        x = layers.rms_norm("hidden_states", scale, c.norm_eps, "cap_embedder.0")
        return layers.linear(layers.rows(x, c.cap_feat_dim), "cap_embedder.1", c.dim, c.cap_feat_dim, bias=True)

    def norms(self, b: GraphBuilder) -> Norms:
        """A block's own norms, which no timestep changes."""
        return Norms(*(b.weight(f"{name}.weight", (self.config.dim,)) for name in _NORMS))

    def modulation(self) -> Graph:
        """Timesteps → what each block's norms multiply by, and the final norm's scale."""
        c, b = self.config, self._builder(Program.MODULATION)
        layers = self.target.layers(b)
        embedding = self._timestep_embedding(b, layers)
        tables = [self._block_modulation(b, layers, embedding, scope) for scope in self._modulated()]
        b.output(b.op("Concat", *tables, name="stack", axis=1), "modulation")
        with b.scope(f"all_final_layer.{_PATCH}"):
            x = layers.silu(embedding, "adaLN_modulation.0")
            x = layers.linear(x, "adaLN_modulation.1", c.dim, c.adaln_dim, bias=True)
            b.output(b.op("Add", x, b.number(1.0), name="scale"), "final_scale")
        return b.build()

    def _modulated(self) -> list[str]:
        return [
            *(f"noise_refiner.{index}" for index in range(self.config.n_refiner_layers)),
            *(f"layers.{index}" for index in range(self.config.n_layers)),
        ]

    def _timestep_embedding(self, b: GraphBuilder, layers: Layers) -> str:
        exponents = np.arange(_FREQUENCIES, dtype=np.float32) / np.float32(_FREQUENCIES)
        # float32's own exp is off by a bit or two, which timesteps up to 1000 turn into 6e-5 of an angle
        frequencies = np.exp(np.float64(np.float32(-np.log(10000.0)) * exponents)).astype(np.float32)[None]
        with b.scope("t_embedder"):
            t = b.op("Mul", "timesteps", b.number(self.config.t_scale), name="scaled")
            t = b.op("Unsqueeze", t, b.integers(1), name="column")
            angles = b.op("Mul", t, b.constant(frequencies, "t_embedder.frequencies"), name="angles")
            cos, sin = b.op("Cos", angles, name="cos"), b.op("Sin", angles, name="sin")
            x = b.op("Concat", cos, sin, name="sinusoid", axis=1)
            x = layers.linear(x, "mlp.0", _TIMESTEP_HIDDEN, 2 * _FREQUENCIES, bias=True)
            return layers.linear(layers.silu(x, "mlp.1"), "mlp.2", self.config.adaln_dim, _TIMESTEP_HIDDEN, bias=True)

    def _block_modulation(self, b: GraphBuilder, layers: Layers, embedding: str, scope: str) -> str:
        """[steps, 1, 4, dim]: scales get their 1, gates their tanh, and each its norm's weight."""
        c = self.config
        with b.scope(scope):
            x = layers.linear(embedding, "adaLN_modulation.0", 4 * c.dim, c.adaln_dim, bias=True)
            parts = b.ops("Split", x, name="split", outputs=4, axis=1, num_outputs=4)
            rows = []
            for part, norm in zip(parts, _NORMS, strict=True):
                if norm.endswith("1"):
                    factor = b.op("Add", part, b.number(1.0), name=f"{norm}.scale")
                else:
                    factor = b.op("Tanh", part, name=f"{norm}.gate")
                row = b.op("Mul", factor, b.weight(f"{norm}.weight", (c.dim,)), name=norm)
                rows.append(b.op("Unsqueeze", row, b.integers(1, 2), name=f"{norm}.row"))
            return b.op("Concat", *rows, name="modulation", axis=2)

    def denoiser(self) -> Graph:
        """Latents → velocity: one step of the transformer over [image, caption]."""
        c, b = self.config, self._builder(Program.DENOISER)
        layers = self.target.layers(b)
        batch = b.dim("latents", 0, "batch")
        image_tables, all_tables = self._tables(b, batch)
        tokens, grid = self._patchify(b, layers, batch)
        x = self._pad(b, tokens, b.weight("x_pad_token", (1, c.dim)), "image_cos", "x_pad", batch)
        norms = self._norm_rows(b)
        shape = b.op("Shape", x, name="image_shape")
        blocks = self._modulated()
        for block, rows in zip(blocks[: c.n_refiner_layers], norms, strict=False):
            with b.scope(block):
                x = self.block(layers, x, shape, rows, image_tables, self.target.fold("transformer", block))
        caption = b.op(
            "Expand",
            "caption",
            b.op("Concat", batch, b.integers(1, 1), name="per_image", axis=0),
            name="captions",
        )
        x = b.op("Concat", x, caption, name="unified", axis=1)
        shape = b.op("Shape", x, name="unified_shape")
        for block, rows in zip(blocks[c.n_refiner_layers :], norms[c.n_refiner_layers :], strict=True):
            with b.scope(block):
                x = self.block(layers, x, shape, rows, all_tables, self.target.fold("transformer", block))
        count = b.dim(tokens, 1, "image_count")
        x = b.op("Slice", x, b.integers(0), count, b.integers(1), name="image_only")
        x = self.final(layers, x)
        self._unpatchify(b, layers, x, grid)
        return b.build()

    def final(self, layers: Layers, x: str) -> str:
        """Image tokens → patches [tokens, patch_dim], of what the model predicts."""
        c, b = self.config, layers.b
        with b.scope(f"all_final_layer.{_PATCH}"):
            x = b.op("LayerNormalization", x, "final_scale", name="norm_final", axis=-1, epsilon=_FINAL_NORM_EPS)
            return layers.linear(layers.rows(x, c.dim), "linear", c.patch_dim, c.dim, bias=True)

    def _norm_rows(self, b: GraphBuilder) -> list[Norms]:
        """The table's rows as [dim] vectors: one `Split`, and no copy of more than a few kilobytes."""
        c = self.config
        count = 4 * c.modulated_blocks
        flat = b.op("Reshape", "modulation", b.integers(-1), name="modulation.flat")
        rows = b.ops("Split", flat, name="modulation.rows", outputs=count, axis=0, num_outputs=count)
        return [Norms(*rows[start : start + 4]) for start in range(0, count, 4)]

    def _tables(self, b: GraphBuilder, batch: str) -> tuple[Tables, Tables]:
        """Rotary tables of the image and of [image, caption], for each image of the batch."""
        per_image = b.op("Concat", batch, b.integers(1, 1), name="rotary.per_image", axis=0)
        image, unified = [], []
        for kind in ("cos", "sin"):
            both = b.op("Concat", f"image_{kind}", f"caption_{kind}", name=f"rotary.{kind}", axis=1)
            image.append(b.op("Expand", f"image_{kind}", per_image, name=f"rotary.image_{kind}"))
            unified.append(b.op("Expand", both, per_image, name=f"rotary.unified_{kind}"))
        return Tables(*image), Tables(*unified)

    def _patchify(self, b: GraphBuilder, layers: Layers, batch: str) -> tuple[str, list[str]]:
        """[batch, channels, 2 rows, 2 columns] → embedded tokens [batch, rows * columns, dim], and the grid."""
        c, two = self.config, b.integers(PATCH_SIZE)
        rows = b.op("Div", b.dim("latents", 2, "latent_h"), two, name="rows")
        columns = b.op("Div", b.dim("latents", 3, "latent_w"), two, name="columns")
        channels = b.integers(c.in_channels)
        shape = b.op("Concat", batch, channels, rows, two, columns, two, name="patchify.shape", axis=0)
        x = b.op("Reshape", "latents", shape, name="patchify.split")
        x = b.op("Transpose", x, name="patchify", perm=[0, 2, 4, 3, 5, 1])
        x = self.embed_image(layers, x)
        tokens = b.op("Concat", batch, b.integers(-1, c.dim), name="tokens.shape", axis=0)
        return layers.reshape(x, tokens, "tokens"), [batch, rows, columns]

    def embed_image(self, layers: Layers, patches: str) -> str:
        """Patches [..., patch_dim] → [tokens, dim]."""
        c = self.config
        with layers.b.scope("all_x_embedder"):
            return layers.linear(layers.rows(patches, c.patch_dim), _PATCH, c.dim, c.patch_dim, bias=True)

    def _unpatchify(self, b: GraphBuilder, layers: Layers, x: str, grid: list[str]) -> None:
        c, two = self.config, b.integers(PATCH_SIZE)
        batch, rows, columns = grid
        channels = b.integers(c.in_channels)
        shape = b.op("Concat", batch, rows, columns, two, two, channels, name="unpatchify.split", axis=0)
        x = b.op("Transpose", layers.reshape(x, shape, "patches"), name="unpatchify", perm=[0, 5, 1, 3, 2, 4])
        x = layers.reshape(x, b.op("Shape", "latents", name="latents.shape"), "model_output")
        # the model predicts the direction towards the image; sigma runs the other way
        b.output(b.op("Neg", x, name="negated"), "velocity")

    def _pad(self, b: GraphBuilder, x: str, token: str, table: str, name: str, batch: str | None = None) -> str:
        """Appends the learned pad token until the sequence is as long as its rotary table."""
        with b.scope(name):
            missing = b.op("Sub", b.dim(table, 1, "padded"), b.dim(x, 1, "count"), name="missing")
            shape = b.op("Concat", batch or b.integers(1), missing, b.integers(self.config.dim), name="shape", axis=0)
            return b.op("Concat", x, b.op("Expand", token, shape, name="tokens"), name="padded_tokens", axis=1)

    def block(self, layers: Layers, x: str, shape: str, norms: Norms, tables: Tables, fold: BlockFold) -> str:
        """One block; its weights are named by the builder's scope."""
        c = self.config
        h = layers.rms_norm(x, norms.attention_in, c.norm_eps, "attention_norm1")
        with layers.b.scope("attention"):
            h = self._attention(layers, layers.rows(h, c.dim), shape, tables)
        h = layers.branch_norm(h, norms.attention_out, c.norm_eps, fold.attention, "attention_norm2")
        x = layers.residual(x, layers.reshape(h, shape, "attention_update"), "attention_residual")
        h = layers.rms_norm(x, norms.ffn_in, c.norm_eps, "ffn_norm1")
        with layers.b.scope("feed_forward"):
            h = layers.gated(layers.rows(h, c.dim), "w1", "w3", "w2", c.dim, c.ffn_dim, -fold.product)
        h = layers.branch_norm(h, norms.ffn_out, c.norm_eps, fold.ffn + fold.product, "ffn_norm2")
        return layers.residual(x, layers.reshape(h, shape, "ffn_update"), "ffn_residual")

    def _attention(self, layers: Layers, x: str, shape: str, tables: Tables) -> str:
        c = self.config
        rotated = []
        for kind in ("q", "k"):
            h = layers.head_norm(layers.linear(x, f"to_{kind}", c.dim, c.dim), f"norm_{kind}", c.head_dim, _QK_NORM_EPS)
            h = layers.reshape(h, shape, f"{kind}.tokens")
            rotated.append(layers.rotary(h, tables.cos, tables.sin, c.n_heads, f"{kind}.rotary", interleaved=True))
        v = layers.reshape(layers.linear(x, "to_v", c.dim, c.dim), shape, "v.tokens")
        h = layers.attention(rotated[0], rotated[1], v, c.n_heads, c.head_dim)
        return layers.linear(layers.rows(h, c.dim), "to_out.0", c.dim, c.dim)


_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
