"""The layers that the transformer and the text encoder are made of, in the operators that ONNX Runtime's CPU
kernels are fastest at: `Gemm` on two-dimensional operands, which takes weights as published ([out, in]); fused
`RMSNormalization` and `RotaryEmbedding`; and an attention that never holds the [tokens, tokens] scores.

Activations are [batch, tokens, width]; `shape` arguments are int64 vectors of that shape.
"""

from dataclasses import dataclass

from .builder import GraphBuilder


@dataclass(frozen=True)
class Layers:
    """Layers on a builder. Weights are named by the builder's scope."""

    b: GraphBuilder

    def linear(self, x: str, name: str, out_width: int, in_width: int, *, bias: bool = False) -> str:
        """A linear layer on rows [rows, in_width] → [rows, out_width]."""
        inputs = [x, self.b.weight(f"{name}.weight", (out_width, in_width))]
        if bias:
            inputs.append(self.b.weight(f"{name}.bias", (out_width,)))
        return self.b.op("Gemm", *inputs, name=name, transB=1)

    def rows(self, x: str, width: int, name: str = "rows") -> str:
        """[…, width] → [rows, width]; no data moves."""
        return self.b.op("Reshape", x, self.b.integers(-1, width), name=name)

    def reshape(self, x: str, shape: str, name: str) -> str:
        """Any shape to the one in `shape`; no data moves."""
        return self.b.op("Reshape", x, shape, name=name)

    def rms_norm(self, x: str, scale: str, epsilon: float, name: str) -> str:
        """Root mean square norm over the last axis, times `scale` (a value, [width])."""
        return self.b.op("RMSNormalization", x, scale, name=name, axis=-1, epsilon=epsilon)

    def rotary(self, x: str, cos: str, sin: str, heads: int, name: str, *, interleaved: bool) -> str:
        """Rotary embedding of [batch, tokens, heads * head_dim]; tables are [batch, tokens, head_dim / 2].

        `interleaved` rotates neighbouring channels (Z-Image), otherwise a head's two halves (Qwen).
        """
        return self.b.op("RotaryEmbedding", x, cos, sin, "", name=name, interleaved=int(interleaved), num_heads=heads)

    def head_norm(self, x: str, name: str, head_dim: int, epsilon: float) -> str:
        """Normalizes each head of a query or key: [rows, heads * head_dim] → [rows * heads, head_dim]."""
        heads = self.rows(x, head_dim, name=f"{name}.heads")
        return self.rms_norm(heads, self.b.weight(f"{name}.weight", (head_dim,)), epsilon, name)

    def attention(self, q: str, k: str, v: str, heads: int, name: str = "scores") -> str:
        """Full attention of [batch, tokens, heads * head_dim]."""
        # the contrib operator is a third faster than opset 23's and blocks over the keys
        return self.b.op("MultiHeadAttention", q, k, v, name=name, contrib=True, num_heads=heads)

    def causal_attention(self, q: str, k: str, v: str, heads: int, kv_heads: int, name: str = "scores") -> str:
        """Causal attention in which `heads` queries share `kv_heads` keys and values. For short sequences."""
        return self.b.op("Attention", q, k, v, name=name, q_num_heads=heads, kv_num_heads=kv_heads, is_causal=1)

    def silu(self, x: str, name: str) -> str:
        """x * sigmoid(x); ONNX Runtime fuses the two."""
        return self.b.op("Mul", x, self.b.op("Sigmoid", x, name=f"{name}.sigmoid"), name=name)

    def gated(self, x: str, gate: str, up: str, down: str, width: int, inner: int) -> str:
        """SwiGLU on rows: down(silu(gate(x)) * up(x)); the three are the names of linear layers."""
        gate_out = self.silu(self.linear(x, gate, inner, width), f"{gate}.silu")
        product = self.b.op("Mul", gate_out, self.linear(x, up, inner, width), name="product")
        return self.linear(product, down, width, inner)
