"""What the model's weights compute for a ControlNet: embeddings of timesteps, and the ControlNet's copy of the tokens.

The copy is refined by the model's own noise refiners, with the hints of the ControlNet's refiner added after them; the
copy that the denoiser goes on with gets none. LoRA change both, as diffusers shares the modules between the two.
"""

from dataclasses import dataclass

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.blocks import noise_blocks
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.programs import Program, hint_name

from .builder import Graph, GraphBuilder
from .target import Target
from .transformer import TransformerGraphs
from .transformer_block import norm_rows, tables_of_images, with_caption


@dataclass(frozen=True)
class ControlledGraphs:
    """Builds a model's programs for a ControlNet."""

    config: ModelConfig
    target: Target

    @property
    def _model(self) -> TransformerGraphs:
        return TransformerGraphs(self.config, self.target)

    def _builder(self, program: Program) -> GraphBuilder:
        c = self.config.transformer
        dims = {
            "dim": c.dim,
            "half_head": c.head_dim // 2,
            "in_channels": c.in_channels,
            "adaln_dim": c.adaln_dim,
            "blocks": c.modulated_blocks,
        }
        return self.target.builder(program, dims)

    def timestep(self) -> Graph:
        """Timesteps → their embeddings."""
        b = self._builder(Program.TIMESTEP)
        b.output(self._model.timestep_embedding(self.target.layers(b)), "embedding")
        return b.build()

    def tokens(self) -> Graph:
        """Latents → image tokens, with pads."""
        b = self._builder(Program.TOKENS)
        b.output(self._model.embedded_image(self.target.layers(b)), "image")
        return b.build()

    def refiners(self) -> Graph:
        """Image tokens and hints → refined tokens, and the control tokens; each with the caption after it."""
        b, dim, places = self._builder(Program.REFINERS), self.config.transformer.dim, noise_blocks(self.config)
        layers = self.target.layers(b)
        batch, control_batch = b.dim("tokens", 0, "batch"), b.dim("control", 0, "control_batch")
        tables = tables_of_images(b, "image_cos", "image_sin", batch, "rotary")
        rows = b.op("Slice", "modulation", b.integers(0), b.integers(len(places)), b.integers(0), name="refiner_rows")
        x, shape = b.input("tokens", DType.F32), b.op("Shape", "tokens", name="image_shape")
        blocks = self._model.blocks
        for index, (place, norms) in enumerate(zip(places, norm_rows(layers, rows, len(places), dim), strict=True)):
            with b.scope(place.name):
                fold = self.target.fold("transformer", place.name)
                x = blocks.block(layers, x, shape, norms, tables, fold)
            x = layers.hint(x, hint_name(index))
        b.output(with_caption(b, x, batch), "unified_tokens")
        b.output(with_caption(b, "control", control_batch, "unified_control_tokens"), "unified_control")
        return b.build()
