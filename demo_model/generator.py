"""The demo model's text encoder and transformer, and what they learn together.

The parameters live in transformers' and diffusers' own modules; their forwards take lists of pictures one by one, so
the batched passes here restate them. Tests compare both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Generator(nn.Module):
    """Both parts, as one module whose parameters are trained together."""

    def __init__(self, text_encoder: Any, transformer: Any) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        text_encoder.model.layers[-1].requires_grad_(False)  # neither it nor the norm is ever used
        text_encoder.model.norm.requires_grad_(False)

    def forward(self, latents: Tensor, times: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The transformer's output [n, 16, h, w]: the negated velocity.

        `times` [n] is 1 - sigma. `tokens` [n, length] are padded on the right to the multiple of 32 that the caption
        takes; `lengths` [n] says how many are real.
        """
        return transform(self.transformer, latents, times, encode_text(self.text_encoder, tokens), lengths)


def encode_text(text_encoder: Any, tokens: Tensor) -> Tensor:
    """Output of the last layer but one, [n, length, width]. Causal, so that padding on the right changes nothing."""
    model = text_encoder.model
    hidden = model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    rope = model.rotary_emb(hidden, positions)
    for layer in model.layers[:-1]:
        hidden = layer(hidden, position_embeddings=rope, attention_mask=None)
    return torch.as_tensor(hidden)


@dataclass(frozen=True)
class Refined:
    """What the layers start from: tokens [n, count, width] of image and caption, and what every block is given."""

    embedded: Tensor  # the image's, before its refiners
    image: Tensor
    caption: Tensor
    image_rope: Tensor
    caption_rope: Tensor
    time: Tensor
    shape: torch.Size  # of the latents

    @property
    def rope(self) -> Tensor:
        """Rotations of image and caption."""
        return torch.cat([self.image_rope, self.caption_rope])


def transform(model: Any, latents: Tensor, times: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
    """The batched pass of `ZImageTransformer2DModel`; shapes as in `Generator.forward`."""
    return finish(model, refine(model, latents, times, captions, lengths), {})


def refine(model: Any, latents: Tensor, times: Tensor, captions: Tensor, lengths: Tensor) -> Refined:
    """The first half of the pass: embeddings and refiners."""
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    time = model.t_embedder(times * model.t_scale)
    embedded = padded_tokens(model.all_x_embedder["2-1"](patches(latents)), model.x_pad_token)
    caption = model.cap_embedder(captions)
    padded = torch.arange(caption.shape[1])[None, :, None] >= lengths[:, None, None]
    caption = torch.where(padded, model.cap_pad_token, caption)

    pads = embedded.shape[1] - rows * columns
    image_rope, caption_rope = _positions(model, rows, columns, pads, caption.shape[1])
    image = embedded
    for block in model.noise_refiner:
        image = run_block(block, image, image_rope, time)
    for block in model.context_refiner:
        caption = run_block(block, caption, caption_rope, None)
    return Refined(embedded, image, caption, image_rope, caption_rope, time, latents.shape)


def finish(model: Any, refined: Refined, hints: Mapping[int, Tensor]) -> Tensor:
    """The second half: the layers, each with its hint [n, tokens, width] added if there is one, and the output."""
    both = torch.cat([refined.image, refined.caption], dim=1)
    rope = refined.rope
    for index, block in enumerate(model.layers):
        both = run_block(block, both, rope, refined.time)
        if index in hints:
            both = both + hints[index]
    count, channels, height, width = refined.shape
    rows, columns = height // 2, width // 2
    final = model.all_final_layer["2-1"]
    out = final(both[:, : rows * columns], c=refined.time)
    out = out.reshape(count, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return torch.as_tensor(out.reshape(refined.shape))


def patches(latents: Tensor) -> Tensor:
    """Latents [n, channels, h, w] as [n, h / 2 x w / 2, 4 x channels], the channel last within a patch."""
    count, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    image = latents.reshape(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
    return image.reshape(count, rows * columns, 4 * channels)


def padded_tokens(tokens: Tensor, pad: Tensor) -> Tensor:
    """Tokens [n, count, width] with `pad` [1, width] after them, up to a multiple of 32."""
    return torch.cat([tokens, pad.expand(len(tokens), -tokens.shape[1] % 32, -1)], dim=1)


def _positions(model: Any, rows: int, columns: int, pads: int, caption: int) -> tuple[Tensor, Tensor]:
    """Rotations [tokens, head_dim / 2, 2] (cosine, sine) of the image's tokens and of the caption's."""
    grid = torch.cartesian_prod(torch.tensor([caption + 1]), torch.arange(rows), torch.arange(columns))
    image = torch.cat([grid, torch.zeros(pads, 3, dtype=grid.dtype)])
    text = torch.cartesian_prod(torch.arange(1, caption + 1), torch.tensor([0]), torch.tensor([0]))
    return torch.view_as_real(model.rope_embedder(image)), torch.view_as_real(model.rope_embedder(text))


def run_block(block: Any, x: Tensor, rope: Tensor, time: Tensor | None) -> Tensor:
    """A transformer block on [n, tokens, width]; without `time` it is a context refiner's, which has no modulation."""
    if time is None:
        x = x + block.attention_norm2(_attention(block.attention, block.attention_norm1(x), rope))
        return torch.as_tensor(x + block.ffn_norm2(_gated(block.feed_forward, block.ffn_norm1(x))))
    scale1, gate1, scale2, gate2 = block.adaLN_modulation(time)[:, None].chunk(4, dim=2)
    inner = _attention(block.attention, block.attention_norm1(x) * (1 + scale1), rope)
    x = x + gate1.tanh() * block.attention_norm2(inner)
    inner = _gated(block.feed_forward, block.ffn_norm1(x) * (1 + scale2))
    return torch.as_tensor(x + gate2.tanh() * block.ffn_norm2(inner))


def _gated(feed_forward: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(feed_forward.w2(functional.silu(feed_forward.w1(x)) * feed_forward.w3(x)))


def _attention(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    query, key, value = (
        part(x).unflatten(-1, (attention.heads, -1)) for part in (attention.to_q, attention.to_k, attention.to_v)
    )
    query, key = _turn(attention.norm_q(query), rope), _turn(attention.norm_k(key), rope)
    mixed = functional.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return torch.as_tensor(attention.to_out[0](mixed.transpose(1, 2).flatten(2)))


def _turn(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates neighbouring pairs of [n, tokens, heads, head_dim]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cosine, sine = rope[:, None].unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
