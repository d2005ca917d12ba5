"""Attention that stores its scores: how it is divided, so that few scores are stored at a time.

An attention of a product, a softmax and a product stores its scores: [heads, tokens, tokens] in float32, which is
2.1 GB for an image of 1024 x 1024. Programs for WebGPU, whose fused attention is wrong on some adapters, compute a few
heads and a block of the queries at a time. The numbers of groups and of blocks are fixed in a program, since ONNX
Runtime has no loop that stays on such a device; the length of a block follows from the size of the image:

    4 bytes x batch x HEADS_PER_GROUP x ceil(tokens / TOKEN_BLOCKS) x tokens          the denoiser's scores
    4 bytes x batch x (floor(positions / POSITION_BLOCKS) + 1) x positions            the autoencoder's

Both stay below `MOST_SCORES` up to 1536 x 1536 with the longest prompt: 252 and 227 MB. Two such blocks are alive at a
time: the scores, and what the softmax makes of them. The fused denoiser stores none.
"""

import math

from .config import ModelConfig
from .geometry import ImageGeometry, padded

HEADS_PER_GROUP = 2
"""Heads of the denoiser whose scores are computed together; the last group has one if their number is odd."""

TOKEN_BLOCKS = 3
"""Blocks of queries, for each group of heads. A sequence is a multiple of 32 tokens, so none is ever empty."""

POSITION_BLOCKS = 24
"""Blocks of queries of the autoencoder's attention, which has one head over all latent positions. The queries are
padded, by one at least, to a multiple of this."""

MOST_SCORES = 256_000_000
"""The most bytes of one block's scores."""

_FLOAT = 4  # bytes


def denoiser_scores(geometry: ImageGeometry, tokens: int, batch: int, config: ModelConfig) -> int:
    """Bytes of one block's scores in the denoiser, for a prompt of `tokens` tokens."""
    sequence = geometry.image_tokens + padded(tokens)
    heads = min(HEADS_PER_GROUP, config.transformer.n_heads)
    return _FLOAT * batch * heads * math.ceil(sequence / TOKEN_BLOCKS) * sequence


def autoencoder_scores(geometry: ImageGeometry, batch: int = 1) -> int:
    """Bytes of one block's scores in the decoder or the encoder."""
    positions = geometry.latent_height * geometry.latent_width
    return _FLOAT * batch * (positions // POSITION_BLOCKS + 1) * positions
