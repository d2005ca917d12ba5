"""The programs of a bundle: their inputs and outputs, with shapes. These names are stated here alone.

The exporter builds programs with exactly these names, and every executor feeds them by these names. All arrays are
float32 in every precision; the precision decides what is inside a program.

Symbols: ``batch`` images of one prompt in one call; ``tokens`` of the prompt; ``caption_tokens`` and
``image_tokens`` are padded to a multiple of 32; ``half_head`` is half of an attention head's channels; ``latent_h``
and ``latent_w`` are the image's height and width over 8; ``blocks`` are the noise refiners, then the main layers.
"""

from dataclasses import dataclass
from enum import StrEnum


class Program(StrEnum):
    """The programs, named as their files are."""

    TEXT_ENCODER = "text_encoder"  # prompt embeddings → hidden states of the last but one layer
    CAPTION = "caption"  # hidden states → caption tokens, once per prompt
    MODULATION = "modulation"  # timesteps → modulation table, once per schedule
    DENOISER = "denoiser"  # latents → velocity, once per step
    DECODER = "decoder"  # latents → image
    ENCODER = "encoder"  # image → latent distribution (for img2img)

    @property
    def component(self) -> str:
        """The folder of the bundle whose weights the program uses."""
        return _COMPONENTS[self]


_COMPONENTS = {
    Program.TEXT_ENCODER: "text_encoder",
    Program.CAPTION: "transformer",
    Program.MODULATION: "transformer",
    Program.DENOISER: "transformer",
    Program.DECODER: "vae",
    Program.ENCODER: "vae",
}

COMPONENTS = ("text_encoder", "transformer", "vae")
"""The parts of a bundle that have weights."""

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a program, each with its shape; names in a shape are free dimensions or config values."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


SIGNATURES: dict[Program, Signature] = {
    Program.TEXT_ENCODER: Signature(
        inputs={
            "inputs_embeds": (1, "tokens", "hidden_size"),
            "cos": (1, "tokens", "half_head"),
            "sin": (1, "tokens", "half_head"),
        },
        outputs={"hidden_states": (1, "tokens", "hidden_size")},
    ),
    Program.CAPTION: Signature(
        inputs={
            "hidden_states": (1, "tokens", "hidden_size"),
            "cos": (1, "caption_tokens", "half_head"),
            "sin": (1, "caption_tokens", "half_head"),
        },
        outputs={"caption": (1, "caption_tokens", "dim")},
    ),
    # The table contains the factors of a step's norms: in order 1 + attention scale, tanh(attention gate),
    # 1 + feed-forward scale and tanh(feed-forward gate), each already times its norm's weight.
    Program.MODULATION: Signature(
        inputs={"timesteps": ("steps",)},
        outputs={"modulation": ("steps", "blocks", 4, "dim"), "final_scale": ("steps", "dim")},
    ),
    Program.DENOISER: Signature(
        inputs={
            "latents": ("batch", "in_channels", "latent_h", "latent_w"),
            "caption": (1, "caption_tokens", "dim"),
            "modulation": ("blocks", 4, "dim"),
            "final_scale": ("dim",),
            "image_cos": (1, "image_tokens", "half_head"),
            "image_sin": (1, "image_tokens", "half_head"),
            "caption_cos": (1, "caption_tokens", "half_head"),
            "caption_sin": (1, "caption_tokens", "half_head"),
        },
        # d latents / d sigma: the sign is the one of `latents += (sigma_next - sigma) * velocity`
        outputs={"velocity": ("batch", "in_channels", "latent_h", "latent_w")},
    ),
    Program.DECODER: Signature(
        # already divided by the scaling factor and shifted; the image is about -1 to 1
        inputs={"latents": ("batch", "latent_channels", "latent_h", "latent_w")},
        outputs={"image": ("batch", 3, "height", "width")},
    ),
    Program.ENCODER: Signature(
        inputs={"image": ("batch", 3, "height", "width")},
        # before the shift and the scaling factor; logvar is clamped to [-30, 20]
        outputs={
            "mean": ("batch", "latent_channels", "latent_h", "latent_w"),
            "logvar": ("batch", "latent_channels", "latent_h", "latent_w"),
        },
    ),
}
