"""The ControlNet of the demo model, as diffusers builds it, and its batched pass.

The layout is that of the published version 2.1: control blocks at every second layer, control blocks as refiners, and
33 input channels: a map's latents, and for inpainting 1 where the picture is kept, and its latents (otherwise zeros).
"""

from typing import Any

import torch
from diffusers import ZImageControlNetModel
from torch import Tensor, nn

from .architecture import TINY
from .generator import Refined, encode_text, finish, padded_tokens, patches, refine, run_block

PLACES = list(range(0, TINY.transformer.n_layers, 2))
"""The layers after which a hint is added."""
CHANNELS = 33


def new_controlnet() -> Any:
    """A `ZImageControlNetModel` that adds nothing yet: every projection from and to it is zero."""
    config = TINY.transformer
    return ZImageControlNetModel(
        control_layers_places=PLACES,
        control_refiner_layers_places=list(range(config.n_refiner_layers)),
        control_in_dim=CHANNELS,
        add_control_noise_refiner="control_noise_refiner",
        dim=config.dim,
        n_refiner_layers=config.n_refiner_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
        norm_eps=config.norm_eps,
        qk_norm=True,
    )


def copy_blocks(controlnet: Any, transformer: Any) -> None:
    """Starts each control block from the transformer's block at its place, and the embedder from the image's."""
    starts = [transformer.layers[place] for place in PLACES]
    for copy, original in zip(controlnet.control_layers, starts, strict=True):
        copy.load_state_dict(original.state_dict(), strict=False)  # the projections stay zero
    for copy, original in zip(controlnet.control_noise_refiner, transformer.noise_refiner, strict=True):
        copy.load_state_dict(original.state_dict(), strict=False)
    ours, image = controlnet.control_all_x_embedder["2-1"], transformer.all_x_embedder["2-1"]
    with torch.no_grad():
        weight = ours.weight.zero_().view(-1, 4, CHANNELS)
        weight[:, :, : TINY.transformer.in_channels] = image.weight.view(-1, 4, TINY.transformer.in_channels)
        ours.bias.copy_(image.bias)


class Controlled(nn.Module):
    """A frozen generator and its ControlNet, whose parameters are the only ones that learn."""

    def __init__(self, text_encoder: Any, transformer: Any, controlnet: Any) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder.requires_grad_(False), transformer.requires_grad_(False)
        self.controlnet = controlnet

    def forward(
        self, latents: Tensor, times: Tensor, tokens: Tensor, lengths: Tensor, control: Tensor, scale: float
    ) -> Tensor:
        """As `Generator.forward`, with `control` [n, 33, h, w], whose hints are multiplied by `scale`."""
        with torch.no_grad():
            captions = encode_text(self.text_encoder, tokens)
            refined = refine(self.transformer, latents, times, captions, lengths)
        return finish(self.transformer, refined, self.hints(refined, control, scale))

    def hints(self, refined: Refined, control: Tensor, scale: float) -> dict[int, Tensor]:
        """The batched pass of `ZImageControlNetModel`: place → hint for the tokens of image and caption."""
        net = self.controlnet
        c = net.control_all_x_embedder["2-1"](patches(control))
        c = padded_tokens(c, self.transformer.x_pad_token)
        # There is one noise refiner: the ControlNet's copy of the tokens is the transformer's own, and one hint more.
        (refiner,) = net.control_noise_refiner
        c = run_block(refiner, refiner.before_proj(c) + refined.embedded, refined.image_rope, refined.time)
        image = refined.image + refiner.after_proj(c) * scale

        both = torch.cat([image, refined.caption], dim=1)
        c = torch.cat([c, refined.caption], dim=1)
        found = {}
        for place, block in zip(PLACES, net.control_layers, strict=True):
            if place == 0:
                c = block.before_proj(c) + both
            c = run_block(block, c, refined.rope, refined.time)
            found[place] = block.after_proj(c) * scale
        return found
