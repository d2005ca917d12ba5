"""Sizes, token counts, positions and rotary tables.

Image tokens sit at (time, row, column) = (caption length + 1, row, column), caption tokens at (1 + i, 0, 0). Both
sequences are padded to a multiple of 32: the caption's pads keep counting, the image's pads all sit at (0, 0, 0).
Source: ``patchify_and_embed`` and ``RopeEmbedder`` in ``transformer_z_image.py``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import FloatArray
from ..errors import RequestError
from .config import PATCH_SIZE, ModelConfig, TextEncoderConfig, TransformerConfig

SEQUENCE_MULTIPLE = 32
"""Every token sequence is padded to a multiple of this."""


@dataclass(frozen=True)
class Rotary:
    """Rotary tables: cosines and sines of the angles, each [1, tokens, head_dim / 2]."""

    cos: FloatArray
    sin: FloatArray


@dataclass(frozen=True)
class ImageGeometry:
    """What an image size means in latents and tokens."""

    width: int  # pixels
    height: int
    latent_width: int
    latent_height: int

    @property
    def rows(self) -> int:
        """Rows of image tokens."""
        return self.latent_height // PATCH_SIZE

    @property
    def columns(self) -> int:
        """Columns of image tokens."""
        return self.latent_width // PATCH_SIZE

    @property
    def image_tokens(self) -> int:
        """Image tokens, pads included."""
        return padded(self.rows * self.columns)


def padded(tokens: int) -> int:
    """The length of a sequence of `tokens` with its pads."""
    return -(-tokens // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def image_geometry(width: int, height: int, config: ModelConfig) -> ImageGeometry:
    """The geometry of a `width` x `height` image.

    Raises `RequestError` if a side is not a multiple of 16, or longer than the model's rotary table.
    """
    multiple = config.vae.scale * PATCH_SIZE
    for name, side, positions in (
        ("width", width, config.transformer.axes_lens[2]),
        ("height", height, config.transformer.axes_lens[1]),
    ):
        longest = positions * multiple
        if side < multiple or side % multiple:
            nearest = min(max(round(side / multiple) * multiple, multiple), longest)
            raise RequestError(
                f"{name} must be a multiple of {multiple}, at least {multiple}; not {side}: try {nearest}"
            )
        if side > longest:
            raise RequestError(f"{name} {side} is more than the {longest} pixels that the model has positions for")
    return ImageGeometry(width, height, width // config.vae.scale, height // config.vae.scale)


def conditioning_bytes(config: TransformerConfig, geometry: ImageGeometry, tokens: int) -> int:
    """What a prompt of `tokens` keeps for all steps, in float32: caption tokens, and rotary tables of all tokens."""
    caption = padded(tokens)
    return 4 * (caption * config.dim + (geometry.image_tokens + caption) * config.head_dim)


def image_positions(geometry: ImageGeometry, caption_tokens: int) -> NDArray[np.int64]:
    """(time, row, column) of each image token, pads included: [image_tokens, 3]."""
    positions = np.zeros((geometry.image_tokens, 3), dtype=np.int64)
    count = geometry.rows * geometry.columns
    row, column = np.divmod(np.arange(count), geometry.columns)
    positions[:count, 0] = caption_tokens + 1
    positions[:count, 1] = row
    positions[:count, 2] = column
    return positions


def caption_positions(caption_tokens: int) -> NDArray[np.int64]:
    """(time, row, column) of each caption token, pads included: [caption_tokens, 3]."""
    positions = np.zeros((caption_tokens, 3), dtype=np.int64)
    positions[:, 0] = 1 + np.arange(caption_tokens)
    return positions


def transformer_rotary(positions: NDArray[np.int64], config: TransformerConfig) -> Rotary:
    """The transformer's tables for positions [tokens, 3]. Angles are float64, then rounded, as in diffusers."""
    angles = [
        np.outer(positions[:, axis], _frequencies(channels, config.rope_theta)).astype(np.float32)
        for axis, channels in enumerate(config.axes_dims)
    ]
    return _tables(np.concatenate(angles, axis=1))


def text_rotary(tokens: int, config: TextEncoderConfig) -> Rotary:
    """The text encoder's tables for positions 0 to `tokens` - 1. Frequencies are float32, as transformers has them."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    return _tables(np.outer(np.arange(tokens, dtype=np.float32), frequencies))


def _frequencies(channels: int, theta: float) -> NDArray[np.float64]:
    exponents = np.arange(0, channels, 2, dtype=np.float64) / channels
    return np.asarray(1.0 / theta**exponents)


def _tables(angles: FloatArray) -> Rotary:
    return Rotary(np.cos(angles)[None], np.sin(angles)[None])
