"""The text encoder (Qwen3) up to ``hidden_states[-2]``: the last layer, the final norm and the head never run.

The embedding table stays on the host, which reads a few of its rows per prompt; the program starts from embeddings.
Source: ``modeling_qwen3.py`` in transformers.
"""

from dataclasses import dataclass

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.blocks import text_blocks
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.linears import layer_linears
from zimage_runtime.model.norms import Norm, layer_norms
from zimage_runtime.model.programs import Program

from ..storage.folds import BlockFold
from .builder import Graph
from .layers import Layers
from .target import Target


@dataclass(frozen=True)
class TextEncoderGraph:
    """Builds the text encoder's program from its configuration."""

    config: ModelConfig
    target: Target

    def build(self) -> Graph:
        """Prompt embeddings → hidden states."""
        c = self.config.text_encoder
        b = self.target.builder(Program.TEXT_ENCODER, {"hidden_size": c.hidden_size, "half_head": c.head_dim // 2})
        layers = self.target.layers(b)
        x = "inputs_embeds"
        shape = b.op("Shape", x, name="shape")
        for place in text_blocks(self.config):
            with b.scope(place.name):
                x = self.layer(layers, x, shape, self.target.fold("text_encoder", place.name))
        b.output(x, "hidden_states")
        return b.build()

    def layer(self, layers: Layers, x: str, shape: str, fold: BlockFold) -> str:
        """One layer; its weights are named by the builder's scope."""
        linears, norms = layer_linears("text_encoder", self.config), layer_norms("text_encoder", self.config)
        b = layers.b
        h = self._norm(layers, x, norms.attention)
        with b.scope("self_attn"):
            h = self._attention(layers, layers.rows(h, linears.query.in_width))
        h = b.cast(layers.reshape(h, shape, "attention_update"), DType.F32)
        x = layers.residual(x, layers.scaled(h, fold.attention, "attention_range"), "attention_residual")
        h = self._norm(layers, x, norms.ffn)
        with b.scope("mlp"):
            gate, up, down = (linear.within("mlp") for linear in (linears.gate, linears.up, linears.down))
            h = layers.gated(layers.rows(h, gate.in_width), gate, up, down, -fold.product)
        h = b.cast(layers.reshape(h, shape, "mlp_update"), DType.F32)
        return layers.residual(x, layers.scaled(h, fold.ffn + fold.product, "mlp_range"), "mlp_residual")

    def _norm(self, layers: Layers, x: str, norm: Norm) -> str:
        return layers.rms_norm(x, layers.b.weight(norm.weight, (norm.width,)), norm.epsilon, norm.name)

    def _attention(self, layers: Layers, x: str) -> str:
        c, b, scope = self.config.text_encoder, layers.b, "self_attn"
        linears, norms = layer_linears("text_encoder", self.config), layer_norms("text_encoder", self.config)
        rotated = []
        inputs = [linear.within(scope) for linear in (linears.query, linears.key, linears.value)]
        values = layers.linears(x, inputs, "qkv")
        for kind, linear, norm, heads in (
            ("q", linears.query, norms.query, c.num_attention_heads),
            ("k", linears.key, norms.key, c.num_key_value_heads),
        ):
            h = layers.head_norm(next(values), norm.within(scope))
            h = layers.reshape(h, b.integers(1, -1, linear.out_width), f"{kind}.tokens")
            rotated.append(layers.rotary(h, "cos", "sin", heads, f"{kind}.rotary", interleaved=False))
        out = linears.out.within(scope)
        v = layers.reshape(next(values), b.integers(1, -1, linears.value.out_width), "v.tokens")
        h = layers.causal_attention(rotated[0], rotated[1], v, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        return layers.linear(layers.rows(h, out.in_width), out)
