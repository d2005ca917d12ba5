"""Attention that stores its scores: how it is divided, so that the scores at hand stay small at any supported size.

WebGPU's fused attention is wrong on some adapters (see `bundle.manifest.WEBGPU_FUSED`), and attention made of products
and a softmax stores its scores: [heads, tokens, tokens] in float32, 2.1 GB for an image of 1024 x 1024. So programs
compute a few heads and a block of the queries at a time. ONNX Runtime has no loop that stays on such a device, so the
numbers of groups and of blocks are fixed in a program, and a block's length follows from the size of the image:

    scores = 4 bytes x batch x HEADS_PER_GROUP x ceil(tokens / TOKEN_BLOCKS) x tokens      the denoiser
    scores = 4 bytes x batch x ceil(positions / POSITION_BLOCKS) x positions               the autoencoder

Both stay below `MOST_SCORES` up to 1536 x 1536 with the longest prompt: 252 and 226 MB. A device holds two such blocks
at a time: the scores, and what the softmax makes of them.
"""

import math

from .config import ModelConfig
from .geometry import ImageGeometry, padded

HEADS_PER_GROUP = 2
"""Heads of the denoiser whose scores are computed together; the last group has one fewer where their number is odd."""

TOKEN_BLOCKS = 3
"""Blocks of queries, for each group of heads. A sequence is a multiple of 32 tokens, so that none is ever empty."""

POSITION_BLOCKS = 24
"""Blocks of queries of the autoencoder's attention, which has one head over all latent positions."""

MOST_SCORES = 256_000_000
"""The most bytes of one block's scores."""

_FLOAT = 4  # bytes


def denoiser_scores(geometry: ImageGeometry, tokens: int, batch: int, config: ModelConfig) -> int:
    """Bytes of one block's scores in the denoiser, for a prompt of `tokens` tokens."""
    sequence = geometry.image_tokens + padded(tokens)
    heads = min(HEADS_PER_GROUP, config.transformer.n_heads)
    return _FLOAT * batch * heads * block_length(sequence, TOKEN_BLOCKS) * sequence


def autoencoder_scores(geometry: ImageGeometry, batch: int = 1) -> int:
    """Bytes of one block's scores in the decoder or the encoder."""
    positions = geometry.latent_height * geometry.latent_width
    return _FLOAT * batch * block_length(positions, POSITION_BLOCKS) * positions


def block_length(queries: int, blocks: int) -> int:
    """Queries of each block but perhaps the last, which may have fewer."""
    return math.ceil(queries / blocks)
