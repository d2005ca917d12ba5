"""The diffusion transformer as three programs: caption (once per prompt), modulation (once per schedule), denoiser.

Architecture (``transformer_z_image.py`` in diffusers). A block is attention, then SwiGLU; each sits between two
RMS norms, of which the second is on the branch's output, before it is added to the residual stream. The timestep
scales the first norm's output and gates the second's. Both are factors per channel, as the norm's weight is, so
the modulation program multiplies them into the weights, and a block is left with four norms.
Queries and keys are normalized per head; rotary embedding is interleaved; pads are attended to, there is no mask.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from zimage_runtime.model.blocks import (
    CAPTION_EMBEDDER,
    FINAL_LAYER,
    IMAGE_EMBEDDER,
    NORMS,
    BlockPlace,
    caption_blocks,
    main_blocks,
    modulated_blocks,
    noise_blocks,
)
from zimage_runtime.model.config import PATCH_SIZE, ModelConfig
from zimage_runtime.model.linears import (
    PATCH,
    TIMESTEP_FREQUENCIES,
    Linear,
    block_linears,
    layer_linears,
    modulation_linears,
)
from zimage_runtime.model.norms import block_norms, layer_norms
from zimage_runtime.model.programs import Program

from ..storage.folds import BlockFold
from .builder import Graph, GraphBuilder
from .layers import Layers
from .target import Target

_FINAL = f"all_final_layer.{PATCH}"


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

    config: ModelConfig
    target: Target

    def _builder(self, program: Program) -> GraphBuilder:
        c = self.config.transformer
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
        dim, b = self.config.transformer.dim, self._builder(Program.CAPTION)
        layers = self.target.layers(b)
        x = layers.reshape(self.embed_caption(layers), b.integers(1, -1, dim), "cap_embedder.tokens")
        x = self._pad(b, x, b.weight("cap_pad_token", (1, dim)), "cos", "cap_pad")
        shape = b.op("Shape", x, name="shape")
        for place in caption_blocks(self.config):
            with b.scope(place.name):
                x = self._placed(layers, place, x, shape, self.norms(b), Tables("cos", "sin"))
        b.output(x, "caption")
        return b.build()

    def embed_caption(self, layers: Layers) -> str:
        """Hidden states → [tokens, dim]."""
        (norm,), (linear,) = block_norms(CAPTION_EMBEDDER, self.config), block_linears(CAPTION_EMBEDDER, self.config)
        scale = layers.b.weight(norm.weight, (norm.width,))
        x = layers.rms_norm("hidden_states", scale, norm.epsilon, norm.name)
        return layers.linear(layers.rows(x, norm.width), linear)

    def norms(self, b: GraphBuilder) -> Norms:
        """A block's own norms, which no timestep changes."""
        return Norms(*(b.weight(f"{name}.weight", (self.config.transformer.dim,)) for name in NORMS))

    def modulation(self) -> Graph:
        """Timesteps → what each block's norms multiply by, and the final norm's scale."""
        b, linears = self._builder(Program.MODULATION), modulation_linears(self.config)
        layers = self.target.layers(b)
        embedding = self._timestep_embedding(b, layers)
        tables = [
            self._block_modulation(b, layers, embedding, place, linear)
            for place, linear in zip(modulated_blocks(self.config), linears.blocks, strict=True)
        ]
        b.output(b.op("Concat", *tables, name="stack", axis=1), "modulation")
        with b.scope(_FINAL):
            x = layers.silu(embedding, "adaLN_modulation.0")
            x = layers.linear(x, linears.final.within(_FINAL))
            b.output(b.op("Add", x, b.number(1.0), name="scale"), "final_scale")
        return b.build()

    def _timestep_embedding(self, b: GraphBuilder, layers: Layers) -> str:
        linears, scope = modulation_linears(self.config), "t_embedder"
        exponents = np.arange(TIMESTEP_FREQUENCIES, dtype=np.float32) / np.float32(TIMESTEP_FREQUENCIES)
        # float32's own exp is off by a bit or two, which timesteps up to 1000 turn into 6e-5 of an angle
        frequencies = np.exp(np.float64(np.float32(-np.log(10000.0)) * exponents)).astype(np.float32)[None]
        with b.scope(scope):
            t = b.op("Mul", "timesteps", b.number(self.config.transformer.t_scale), name="scaled")
            t = b.op("Unsqueeze", t, b.integers(1), name="column")
            angles = b.op("Mul", t, b.constant(frequencies, "t_embedder.frequencies"), name="angles")
            cos, sin = b.op("Cos", angles, name="cos"), b.op("Sin", angles, name="sin")
            x = b.op("Concat", cos, sin, name="sinusoid", axis=1)
            x = layers.linear(x, linears.hidden.within(scope))
            return layers.linear(layers.silu(x, "mlp.1"), linears.embedding.within(scope))

    def _block_modulation(
        self, b: GraphBuilder, layers: Layers, embedding: str, place: BlockPlace, linear: Linear
    ) -> str:
        """[steps, 1, 4, dim]: 1 + scale and tanh(gate), each times its norm's weight."""
        dim = self.config.transformer.dim
        with b.scope(place.name):
            x = layers.linear(embedding, linear.within(place.name))
            parts = b.ops("Split", x, name="split", outputs=4, axis=1, num_outputs=4)
            rows = []
            for part, norm in zip(parts, NORMS, strict=True):
                if norm.endswith("1"):
                    factor = b.op("Add", part, b.number(1.0), name=f"{norm}.scale")
                else:
                    factor = b.op("Tanh", part, name=f"{norm}.gate")
                row = b.op("Mul", factor, b.weight(f"{norm}.weight", (dim,)), name=norm)
                rows.append(b.op("Unsqueeze", row, b.integers(1, 2), name=f"{norm}.row"))
            return b.op("Concat", *rows, name="modulation", axis=2)

    def denoiser(self) -> Graph:
        """Latents → velocity: one step of the transformer over [image, caption]."""
        b, refiners = self._builder(Program.DENOISER), noise_blocks(self.config)
        layers = self.target.layers(b)
        batch = b.dim("latents", 0, "batch")
        image_tables, all_tables = self._tables(b, batch)
        tokens, grid = self._patchify(b, layers, batch)
        x = self._pad(b, tokens, b.weight("x_pad_token", (1, self.config.transformer.dim)), "image_cos", "x_pad", batch)
        norms = self._norm_rows(layers)
        shape = b.op("Shape", x, name="image_shape")
        for place, rows in zip(refiners, norms[: len(refiners)], strict=True):
            with b.scope(place.name):
                x = self._placed(layers, place, x, shape, rows, image_tables)
        caption = b.op(
            "Expand",
            "caption",
            b.op("Concat", batch, b.integers(1, 1), name="per_image", axis=0),
            name="captions",
        )
        x = b.op("Concat", x, caption, name="unified", axis=1)
        shape = b.op("Shape", x, name="unified_shape")
        for place, rows in zip(main_blocks(self.config), norms[len(refiners) :], strict=True):
            with b.scope(place.name):
                x = self._placed(layers, place, x, shape, rows, all_tables)
        count = b.dim(tokens, 1, "image_count")
        x = b.op("Slice", x, b.integers(0), count, b.integers(1), name="image_only")
        x = self.final(layers, x)
        self._unpatchify(b, layers, x, grid)
        return b.build()

    def final(self, layers: Layers, x: str) -> str:
        """Image tokens → patches [tokens, patch_dim] of the model's prediction."""
        b = layers.b
        (norm,), (linear,) = block_norms(FINAL_LAYER, self.config), block_linears(FINAL_LAYER, self.config)
        norm = norm.within(_FINAL)
        with b.scope(_FINAL):
            x = b.op("LayerNormalization", x, "final_scale", name=norm.name, axis=-1, epsilon=norm.epsilon)
            return layers.linear(layers.rows(x, norm.width), linear.within(_FINAL))

    def _norm_rows(self, layers: Layers) -> list[Norms]:
        """The modulation table's rows as [dim] vectors, of a few kilobytes."""
        count = 4 * self.config.transformer.modulated_blocks
        rows = layers.table_rows("modulation", count, self.config.transformer.dim, "modulation")
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
        c, two = self.config.transformer, b.integers(PATCH_SIZE)
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
        (linear,), scope = block_linears(IMAGE_EMBEDDER, self.config), "all_x_embedder"
        with layers.b.scope(scope):
            return layers.linear(layers.rows(patches, linear.in_width), linear.within(scope))

    def _unpatchify(self, b: GraphBuilder, layers: Layers, x: str, grid: list[str]) -> None:
        two = b.integers(PATCH_SIZE)
        batch, rows, columns = grid
        channels = b.integers(self.config.transformer.in_channels)
        shape = b.op("Concat", batch, rows, columns, two, two, channels, name="unpatchify.split", axis=0)
        x = b.op("Transpose", layers.reshape(x, shape, "patches"), name="unpatchify", perm=[0, 5, 1, 3, 2, 4])
        x = layers.reshape(x, b.op("Shape", "latents", name="latents.shape"), "model_output")
        # the model predicts the direction towards the image; sigma runs the other way
        b.output(b.op("Neg", x, name="negated"), "velocity")

    def _pad(self, b: GraphBuilder, x: str, token: str, table: str, name: str, batch: str | None = None) -> str:
        """Appends the learned pad token until the sequence is as long as its rotary table."""
        with b.scope(name):
            missing = b.op("Sub", b.dim(table, 1, "padded"), b.dim(x, 1, "count"), name="missing")
            count, dim = batch or b.integers(1), b.integers(self.config.transformer.dim)
            shape = b.op("Concat", count, missing, dim, name="shape", axis=0)
            return b.op("Concat", x, b.op("Expand", token, shape, name="tokens"), name="padded_tokens", axis=1)

    def _placed(self, layers: Layers, place: BlockPlace, x: str, shape: str, norms: Norms, tables: Tables) -> str:
        return self.block(layers, x, shape, norms, tables, self.target.fold("transformer", place.name))

    def block(self, layers: Layers, x: str, shape: str, norms: Norms, tables: Tables, fold: BlockFold) -> str:
        """One block; its weights are named by the builder's scope."""
        linears, scope = layer_linears("transformer", self.config), "feed_forward"
        epsilon = self.config.transformer.norm_eps
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
        c, scope = self.config.transformer, "attention"
        linears, norms = layer_linears("transformer", self.config), layer_norms("transformer", self.config)
        rotated = []
        inputs = [linear.within(scope) for linear in (linears.query, linears.key, linears.value)]
        values = layers.linears(x, inputs, "qkv")
        for kind, norm in (("q", norms.query), ("k", norms.key)):
            h = layers.head_norm(next(values), norm.within(scope))
            h = layers.reshape(h, shape, f"{kind}.tokens")
            rotated.append(layers.rotary(h, tables.cos, tables.sin, c.n_heads, f"{kind}.rotary", interleaved=True))
        v = layers.reshape(next(values), shape, "v.tokens")
        h = layers.attention(rotated[0], rotated[1], v, c.n_heads, c.head_dim)
        return layers.linear(layers.rows(h, c.dim), linears.out.within(scope))
