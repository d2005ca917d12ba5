"""How many operations an image takes: matrix products, convolutions and attention, without norms and the like.

A multiplication and an addition are two operations. They are counted from the configuration: the caption once, no last
text layer, and causal attention in full, as every implementation here computes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .blocks import (
    CAPTION_EMBEDDER,
    FINAL_LAYER,
    IMAGE_EMBEDDER,
    BlockPlace,
    caption_blocks,
    convolutions,
    decoder_blocks,
    main_blocks,
    noise_blocks,
    text_blocks,
)
from .config import ModelConfig
from .geometry import ImageGeometry, padded
from .linears import block_linears, layer_linears


@dataclass(frozen=True)
class Operations:
    """Of one stage. Linear layers are separate: an int8 bundle computes those, and only those, in integers."""

    linear: float = 0.0
    other: float = 0.0  # attention and convolutions

    @property
    def total(self) -> float:
        """Linear layers and everything else."""
        return self.linear + self.other

    def __add__(self, more: "Operations") -> "Operations":
        return Operations(self.linear + more.linear, self.other + more.other)


def text_operations(config: ModelConfig, tokens: int) -> Operations:
    """The text encoder's used layers for a prompt of `tokens`, and the caption's embedding and refiners."""
    encoder = _sum(_layer(place, config, tokens) for place in text_blocks(config))
    refiners = _sum(_layer(place, config, padded(tokens)) for place in caption_blocks(config))
    return encoder + _linears(CAPTION_EMBEDDER, config, tokens) + refiners


def step_operations(config: ModelConfig, geometry: ImageGeometry, tokens: int) -> Operations:
    """One denoising step of one image; `tokens` are the prompt's."""
    image = geometry.image_tokens
    ends = _linears(IMAGE_EMBEDDER, config, image) + _linears(FINAL_LAYER, config, image)
    refiners = _sum(_layer(place, config, image) for place in noise_blocks(config))
    return ends + refiners + _sum(_layer(place, config, image + padded(tokens)) for place in main_blocks(config))


def decode_operations(config: ModelConfig, geometry: ImageGeometry) -> Operations:
    """The VAE's decoder. Its attention's linear layers are float in every precision, and count as other."""
    count, latents = 0.0, geometry.latent_width * geometry.latent_height
    for place in decoder_blocks(config):
        pixels = latents * place.out_scale**2
        for c in convolutions(place):
            count += 2.0 * c.in_channels * c.out_channels * c.side**2 * pixels
        if linears := block_linears(place, config):
            count += 2.0 * pixels * sum(linear.parameters for linear in linears)
            count += 4.0 * pixels**2 * place.channels
    return Operations(other=count)


def _layer(place: BlockPlace, config: ModelConfig, tokens: int) -> Operations:
    heads = layer_linears(place.kind.component, config).query.out_width
    return _linears(place, config, tokens) + Operations(other=4.0 * tokens * tokens * heads)


def _linears(place: BlockPlace, config: ModelConfig, tokens: int) -> Operations:
    return Operations(linear=2.0 * tokens * sum(linear.parameters for linear in block_linears(place, config)))


def _sum(parts: Iterable[Operations]) -> Operations:
    return sum(parts, Operations())
