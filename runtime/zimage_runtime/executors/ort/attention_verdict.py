"""Whether the fused attention computes right on this adapter: `MultiHeadAttention`, a kernel of ONNX Runtime's.

On Vulkan it is silently wrong by 4 to 10 % from 32 tokens on (onnxruntime-ep-webgpu 0.4.0): accumulators that are
declared in a loop, and so are zero in each turn by WebGPU's rules, are zeroed once (see
``docs/webgpu_attention``). Images still look like images. So it is asked, on random values of the bundle's own head
size, and used only where the answer is right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from ...arrays import FloatArray
from ...machine.tiny_onnx import Element, Node, Value, onnx_model
from .webgpu_adapters import Adapter
from .webgpu_answers import relative_error, run_on_webgpu

TOKENS = 160
"""Of the question: several tiles of keys, and not a power of two of them."""

_HEADS = 2
_TOLERANCE = 1e-4

Attend = Callable[[FloatArray, FloatArray, FloatArray, int], FloatArray]
"""Queries, keys and values [1, tokens, heads * head_dim] and the number of heads → the same shape."""


@dataclass(frozen=True)
class Verdict:
    """Whether the fused attention may be used, and why."""

    right: bool
    text: str


def judge(attend: Attend, head_dim: int) -> Verdict:
    """The verdict on a kernel, from its answer."""
    random = np.random.default_rng(0)
    shape = (1, TOKENS, _HEADS * head_dim)
    queries, keys, values = (random.standard_normal(shape, dtype=np.float32) for _ in range(3))
    expected = attention(queries, keys, values, _HEADS)
    try:
        found = attend(queries, keys, values, _HEADS)
    except Exception as error:  # whatever the library raises
        return Verdict(False, f"fused attention cannot be computed ({' '.join(str(error).split())[:200]})")
    distance = relative_error(found, expected)
    if distance < _TOLERANCE:
        return Verdict(True, "fused attention computes right")
    return Verdict(False, f"fused attention is wrong by {distance:.1e}, and not used")


@cache
def verdict_on(adapter: Adapter, head_dim: int) -> Verdict:
    """The verdict on the adapter's kernel, asked once per process. A software adapter takes minutes to compile it, and
    would gain nothing: it is not asked."""
    if adapter.software:
        return Verdict(False, "fused attention is not asked of a software adapter")
    return judge(attend_on_webgpu, head_dim)


def attend_on_webgpu(queries: FloatArray, keys: FloatArray, values: FloatArray, heads: int) -> FloatArray:
    """The fused attention of the adapter. Raises what the library raises."""
    value = Value(Element.FLOAT, queries.shape)
    model = onnx_model(
        [Node("MultiHeadAttention", "q k v", "y", {"num_heads": heads}, domain="com.microsoft")],
        dict.fromkeys("qkv", value),
        {"y": value},
        opset=23,
        domains={"com.microsoft": 1},
    )
    return run_on_webgpu(model, {"q": queries, "k": keys, "v": values})


def attention(queries: FloatArray, keys: FloatArray, values: FloatArray, heads: int) -> FloatArray:
    """Attention in float64, as it is defined."""
    _, tokens, width = queries.shape
    q, k, v = (x.astype(np.float64).reshape(tokens, heads, -1).transpose(1, 0, 2) for x in (queries, keys, values))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(width // heads)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: FloatArray = (weights @ v).transpose(1, 0, 2).reshape(1, tokens, width).astype(np.float32)
    return mixed
