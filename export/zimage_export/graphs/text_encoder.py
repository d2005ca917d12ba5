"""The text encoder (Qwen3) up to ``hidden_states[-2]``: the last layer, the final norm and the head never run.

The embedding table stays on the host, where a prompt reads its few rows; the program starts from embeddings.
Source: ``modeling_qwen3.py`` in transformers.
"""

from dataclasses import dataclass

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.config import TextEncoderConfig
from zimage_runtime.model.programs import Program

from ..storage.folds import BlockFold
from .builder import Graph
from .layers import Layers
from .target import Target


@dataclass(frozen=True)
class TextEncoderGraph:
    """Builds the text encoder's program from its configuration."""

    config: TextEncoderConfig
    target: Target

    def build(self) -> Graph:
        """Prompt embeddings → hidden states."""
        c = self.config
        b = self.target.builder(Program.TEXT_ENCODER, {"hidden_size": c.hidden_size, "half_head": c.head_dim // 2})
        layers = self.target.layers(b)
        x = "inputs_embeds"
        shape = b.op("Shape", x, name="shape")
        for index in range(c.used_layers):
            fold = self.target.fold("text_encoder", f"layers.{index}")
            with b.scope(f"layers.{index}"):
                x = self.layer(layers, x, shape, fold)
        b.output(x, "hidden_states")
        return b.build()

    def layer(self, layers: Layers, x: str, shape: str, fold: BlockFold) -> str:
        """One layer; its weights are named by the builder's scope."""
        c, b = self.config, layers.b
        scale = b.weight("input_layernorm.weight", (c.hidden_size,))
        h = layers.rms_norm(x, scale, c.rms_norm_eps, "input_layernorm")
        with b.scope("self_attn"):
            h = self._attention(layers, layers.rows(h, c.hidden_size))
        h = b.cast(layers.reshape(h, shape, "attention_update"), DType.F32)
        x = layers.residual(x, layers.scaled(h, fold.attention, "attention_range"), "attention_residual")
        scale = b.weight("post_attention_layernorm.weight", (c.hidden_size,))
        h = layers.rms_norm(x, scale, c.rms_norm_eps, "post_attention_layernorm")
        with b.scope("mlp"):
            names = ("gate_proj", "up_proj", "down_proj")
            h = layers.gated(layers.rows(h, c.hidden_size), *names, c.hidden_size, c.intermediate_size, -fold.product)
        h = b.cast(layers.reshape(h, shape, "mlp_update"), DType.F32)
        return layers.residual(x, layers.scaled(h, fold.ffn + fold.product, "mlp_range"), "mlp_residual")

    def _attention(self, layers: Layers, x: str) -> str:
        c, b = self.config, layers.b
        widths = {"q": c.num_attention_heads * c.head_dim, "k": c.num_key_value_heads * c.head_dim}
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}
        rotated = []
        for kind, width in widths.items():
            h = layers.linear(x, f"{kind}_proj", width, c.hidden_size)
            h = layers.head_norm(h, f"{kind}_norm", c.head_dim, c.rms_norm_eps)
            h = layers.reshape(h, b.integers(1, -1, width), f"{kind}.tokens")
            rotated.append(layers.rotary(h, "cos", "sin", heads[kind], f"{kind}.rotary", interleaved=False))
        v = layers.reshape(
            layers.linear(x, "v_proj", widths["k"], c.hidden_size), b.integers(1, -1, widths["k"]), "v.tokens"
        )
        h = layers.causal_attention(rotated[0], rotated[1], v, heads["q"], heads["k"], c.head_dim)
        return layers.linear(layers.rows(h, widths["q"]), "o_proj", c.hidden_size, widths["q"])
