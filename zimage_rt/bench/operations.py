"""How many operations a picture takes: matrix products, convolutions and attention; norms and the like are left out.

A multiplication and an addition are two operations. Counted from the configuration, for the work that has to be done:
the caption once, no last text layer, causal attention in full (as every implementation here computes it).
"""

from dataclasses import dataclass

from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.geometry import ImageGeometry, padded


@dataclass(frozen=True)
class Operations:
    """Of one stage. Linear layers are apart, for an int8 bundle computes those, and only those, in integers."""

    linear: float
    other: float  # attention and convolutions

    @property
    def total(self) -> float:
        """Both."""
        return self.linear + self.other

    def __add__(self, more: "Operations") -> "Operations":
        return Operations(self.linear + more.linear, self.other + more.other)


def text_operations(config: ModelConfig, tokens: int) -> Operations:
    """The text encoder's used layers for a prompt, and the caption's embedding and refiners."""
    text, model = config.text_encoder, config.transformer
    heads = text.num_attention_heads * text.head_dim
    grouped = text.num_key_value_heads * text.head_dim
    weights = text.hidden_size * (2 * heads + 2 * grouped + 3 * text.intermediate_size)
    encoder = Operations(2.0 * tokens * weights, 4.0 * tokens * tokens * heads)
    caption = padded(tokens)
    embedder = Operations(2.0 * tokens * model.cap_feat_dim * model.dim, 0.0)
    return _times(encoder, text.used_layers) + embedder + _times(_block(config, caption), model.n_refiner_layers)


def step_operations(config: ModelConfig, geometry: ImageGeometry, tokens: int) -> Operations:
    """One denoising step of one picture."""
    model, image = config.transformer, geometry.image_tokens
    embedders = Operations(4.0 * image * model.dim * model.patch_dim, 0.0)  # the first layer and the last
    refiners = _times(_block(config, image), model.n_refiner_layers)
    return embedders + refiners + _times(_block(config, image + padded(tokens)), model.n_layers)


def _block(config: ModelConfig, tokens: int) -> Operations:
    model = config.transformer
    weights = 4 * model.dim * model.dim + 3 * model.dim * model.ffn_dim
    return Operations(2.0 * tokens * weights, 4.0 * tokens * tokens * model.dim)


def decode_operations(config: ModelConfig, geometry: ImageGeometry) -> Operations:
    """The VAE's decoder. Its attention's linear layers are float in every precision, and count as other."""
    vae = config.vae
    pixels = geometry.latent_width * geometry.latent_height
    channels = vae.block_out_channels[-1]
    count = _convolution(vae.latent_channels, channels, pixels)
    count += 4 * _convolution(channels, channels, pixels)  # two residual blocks in the middle
    count += 2.0 * pixels * 4 * channels * channels + 4.0 * pixels * pixels * channels
    for level, out in enumerate(reversed(vae.block_out_channels)):
        for layer in range(vae.layers_per_block + 1):
            inside = channels if layer == 0 else out
            count += _convolution(inside, out, pixels) + _convolution(out, out, pixels)
            count += _convolution(inside, out, pixels, side=1) if inside != out else 0.0
        channels = out
        if level < len(vae.block_out_channels) - 1:
            pixels *= 4
            count += _convolution(out, out, pixels)
    return Operations(0.0, count + _convolution(channels, vae.out_channels, pixels))


def _convolution(inside: int, out: int, pixels: int, side: int = 3) -> float:
    return 2.0 * inside * out * side * side * pixels


def _times(one: Operations, count: int) -> Operations:
    return Operations(one.linear * count, one.other * count)
