"""The diffusion transformer as three programs: caption (once per prompt), modulation (once per schedule), denoiser.

Architecture (``transformer_z_image.py`` in diffusers). A block is attention, then SwiGLU; each sits between two
RMS norms, of which the second is on the branch's output, before it is added to the residual stream. The timestep
scales the first norm's output and gates the second's. Both are factors per channel, as the norm's weight is, so
the modulation program multiplies them into the weights, and a block is left with four norms.
Queries and keys are normalized per head; rotary embedding is interleaved; pads are attended to, there is no mask.
"""

from dataclasses import dataclass

import numpy as np

from zimage_runtime.model.blocks import (
    CAPTION_EMBEDDER,
    FINAL_LAYER,
    IMAGE_EMBEDDER,
    BlockPlace,
    caption_blocks,
    main_blocks,
    modulated_blocks,
    noise_blocks,
)
from zimage_runtime.model.config import PATCH_SIZE, ModelConfig
from zimage_runtime.model.linears import PATCH, TIMESTEP_FREQUENCIES, block_linears, modulation_linears
from zimage_runtime.model.norms import block_norms
from zimage_runtime.model.programs import Program, hint_name

from .builder import Graph, GraphBuilder
from .layers import Layers
from .target import Target
from .transformer_block import BlockGraphs, Norms, Tables, norm_rows, pad, patchify, with_caption

_FINAL = f"all_final_layer.{PATCH}"


@dataclass(frozen=True)
class TransformerGraphs:
    """Builds the transformer's programs from its configuration."""

    config: ModelConfig
    target: Target

    @property
    def blocks(self) -> BlockGraphs:
        """The statement of a block."""
        return BlockGraphs(self.config.transformer, self.target)

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
        x = pad(b, x, b.weight("cap_pad_token", (1, dim)), "cos", "cap_pad", dim)
        shape = b.op("Shape", x, name="shape")
        for place in caption_blocks(self.config):
            with b.scope(place.name):
                x = self._placed(layers, place, x, shape, self.blocks.norms(b), Tables("cos", "sin"))
        b.output(x, "caption")
        return b.build()

    def embed_caption(self, layers: Layers) -> str:
        """Hidden states → [tokens, dim]."""
        (norm,), (linear,) = block_norms(CAPTION_EMBEDDER, self.config), block_linears(CAPTION_EMBEDDER, self.config)
        scale = layers.b.weight(norm.weight, (norm.width,))
        x = layers.rms_norm("hidden_states", scale, norm.epsilon, norm.name)
        return layers.linear(layers.rows(x, norm.width), linear)

    def modulation(self) -> Graph:
        """Timesteps → what each block's norms multiply by, and the final norm's scale."""
        b, linears = self._builder(Program.MODULATION), modulation_linears(self.config)
        layers = self.target.layers(b)
        embedding = self.timestep_embedding(layers)
        tables = [
            self.blocks.modulation(layers, embedding, place.name, linear)
            for place, linear in zip(modulated_blocks(self.config), linears.blocks, strict=True)
        ]
        b.output(b.op("Concat", *tables, name="stack", axis=1), "modulation")
        with b.scope(_FINAL):
            x = layers.silu(embedding, "adaLN_modulation.0")
            x = layers.linear(x, linears.final.within(_FINAL))
            b.output(b.op("Add", x, b.number(1.0), name="scale"), "final_scale")
        return b.build()

    def timestep_embedding(self, layers: Layers) -> str:
        """Timesteps [steps] → [steps, adaln_dim]."""
        b, linears, scope = layers.b, modulation_linears(self.config), "t_embedder"
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

    def denoiser(self) -> Graph:
        """Latents → velocity: one step of the transformer over [image, caption]."""
        b, refiners = self._builder(Program.DENOISER), noise_blocks(self.config)
        layers = self.target.layers(b)
        batch = b.dim("latents", 0, "batch")
        image_tables, all_tables = self._tables(b, batch)
        tokens, grid = self._patchify(b, layers, batch)
        x = self.padded_image(b, tokens, batch)
        norms = norm_rows(layers, "modulation", self.config.transformer.modulated_blocks, self.config.transformer.dim)
        shape = b.op("Shape", x, name="image_shape")
        for place, rows in zip(refiners, norms[: len(refiners)], strict=True):
            with b.scope(place.name):
                x = self._placed(layers, place, x, shape, rows, image_tables)
        x = with_caption(b, x, batch)
        shape = b.op("Shape", x, name="unified_shape")
        for index, (place, rows) in enumerate(zip(main_blocks(self.config), norms[len(refiners) :], strict=True)):
            with b.scope(place.name):
                x = self._placed(layers, place, x, shape, rows, all_tables)
            if layers.extended:
                x = layers.hint(x, hint_name(index))
        count = b.dim(tokens, 1, "image_count")
        x = b.op("Slice", x, b.integers(0), count, b.integers(1), name="image_only")
        x = self.final(layers, x)
        self._unpatchify(b, layers, x, grid)
        return b.build()

    def padded_image(self, b: GraphBuilder, tokens: str, batch: str) -> str:
        """Embedded tokens of images, with pads."""
        dim = self.config.transformer.dim
        return pad(b, tokens, b.weight("x_pad_token", (1, dim)), "image_cos", "x_pad", dim, batch)

    def final(self, layers: Layers, x: str) -> str:
        """Image tokens → patches [tokens, patch_dim] of the model's prediction."""
        b = layers.b
        (norm,), (linear,) = block_norms(FINAL_LAYER, self.config), block_linears(FINAL_LAYER, self.config)
        norm = norm.within(_FINAL)
        with b.scope(_FINAL):
            x = b.op("LayerNormalization", x, "final_scale", name=norm.name, axis=-1, epsilon=norm.epsilon)
            return layers.linear(layers.rows(x, norm.width), linear.within(_FINAL))

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
        c = self.config.transformer
        patches, (rows, columns) = patchify(b, batch, c.in_channels)
        x = self.embed_image(layers, patches)
        tokens = b.op("Concat", batch, b.integers(-1, c.dim), name="tokens.shape", axis=0)
        return layers.reshape(x, tokens, "tokens"), [batch, rows, columns]

    def embedded_image(self, layers: Layers) -> str:
        """Latents → the tokens of images, with pads: [batch, image_tokens, dim]."""
        batch = layers.b.dim("latents", 0, "batch")
        tokens, _ = self._patchify(layers.b, layers, batch)
        return self.padded_image(layers.b, tokens, batch)

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

    def _placed(self, layers: Layers, place: BlockPlace, x: str, shape: str, norms: Norms, tables: Tables) -> str:
        return self.blocks.block(layers, x, shape, norms, tables, self.target.fold("transformer", place.name))
