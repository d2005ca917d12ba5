"""Flash attention as ONNX Runtime's kernel computes it on Vulkan: see ``docs/webgpu_attention``."""

import numpy as np

from zimage_runtime.arrays import FloatArray

TILE = 8
"""Keys at a time, as many as a software adapter's subgroup has lanes."""


def stale_attention(queries: FloatArray, keys: FloatArray, values: FloatArray, heads: int) -> FloatArray:
    """Flash attention whose scores are added to those of the last tile of keys: what Vulkan computes."""
    _, tokens, width = queries.shape
    q, k, v = (x.astype(np.float64).reshape(tokens, heads, -1).transpose(1, 0, 2) for x in (queries, keys, values))
    q /= np.sqrt(width // heads)
    most, total, mixed = np.full((heads, tokens, 1), -1e30), np.zeros((heads, tokens, 1)), np.zeros_like(q)
    scores = np.zeros((heads, tokens, TILE))
    for start in range(0, tokens, TILE):
        scores = scores + q @ k[:, start : start + TILE].transpose(0, 2, 1)
        highest = np.maximum(most, scores.max(-1, keepdims=True))
        scores = np.exp(scores - highest)
        kept = total * np.exp(most - highest)
        total, most = kept + scores.sum(-1, keepdims=True), highest
        scores = scores / total
        mixed = mixed * (kept / total) + scores @ v[:, start : start + TILE]
    return mixed.transpose(1, 0, 2).reshape(1, tokens, width).astype(np.float32)
