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
    # for a ControlNet, of the model: these come extended only (see `model.branches`)
    TIMESTEP = "timestep"  # timesteps → their embeddings, once per schedule
    TOKENS = "tokens"  # latents → image tokens, once per step
    REFINERS = "refiners"  # image tokens and hints → refined tokens of image and caption, once per step
    # of a ControlNet's own folder (see `model.control`)
    CONTROL_TOKENS = "control_tokens"  # latents of the control image → its tokens, once per image
    CONTROL_MODULATION = "control_modulation"  # embeddings of timesteps → modulation table, once per schedule
    CONTROL_REFINER = "control_refiner"  # control tokens → hints for the refiners, once per step
    CONTROL_LAYERS = "control_layers"  # control tokens → hints for the layers, once per step

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
    Program.TIMESTEP: "transformer",
    Program.TOKENS: "transformer",
    Program.REFINERS: "transformer",
    Program.CONTROL_TOKENS: "controlnet",
    Program.CONTROL_MODULATION: "controlnet",
    Program.CONTROL_REFINER: "controlnet",
    Program.CONTROL_LAYERS: "controlnet",
}

MODEL_PROGRAMS = (
    Program.TEXT_ENCODER,
    Program.CAPTION,
    Program.MODULATION,
    Program.DENOISER,
    Program.DECODER,
    Program.ENCODER,
)
"""What a bundle generates images with."""

CONTROLLED_PROGRAMS = (Program.TIMESTEP, Program.TOKENS, Program.REFINERS)
"""What a bundle computes for a ControlNet: the ControlNet's own copy of the tokens."""

CONTROL_PROGRAMS = (
    Program.CONTROL_TOKENS,
    Program.CONTROL_MODULATION,
    Program.CONTROL_REFINER,
    Program.CONTROL_LAYERS,
)
"""What a ControlNet's folder may have. Version 2.0 has no refiner of its own."""

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
    Program.TIMESTEP: Signature(
        inputs={"timesteps": ("steps",)},
        outputs={"embedding": ("steps", "adaln_dim")},
    ),
    Program.TOKENS: Signature(
        inputs={
            "latents": ("batch", "in_channels", "latent_h", "latent_w"),
            "image_cos": (1, "image_tokens", "half_head"),
        },
        outputs={"image": ("batch", "image_tokens", "dim")},
    ),
    # The hints of a control refiner follow (`hint_name`). The control tokens pass through: the caption is joined to
    # them as to the image tokens, and joining takes a program where values are on a device.
    Program.REFINERS: Signature(
        inputs={
            "tokens": ("batch", "image_tokens", "dim"),
            "control": ("control_batch", "image_tokens", "dim"),
            "caption": (1, "caption_tokens", "dim"),
            "modulation": ("blocks", 4, "dim"),
            "image_cos": (1, "image_tokens", "half_head"),
            "image_sin": (1, "image_tokens", "half_head"),
        },
        outputs={
            "unified_tokens": ("batch", "all_tokens", "dim"),
            "unified_control": ("control_batch", "all_tokens", "dim"),
        },
    ),
    Program.CONTROL_TOKENS: Signature(
        inputs={
            "latents": (1, "control_channels", "latent_h", "latent_w"),
            "pad_token": (1, "dim"),  # the model's
            "image_cos": (1, "image_tokens", "half_head"),
        },
        outputs={"control": (1, "image_tokens", "dim")},
    ),
    Program.CONTROL_MODULATION: Signature(
        inputs={"embedding": ("steps", "adaln_dim")},
        outputs={"modulation": ("steps", "control_blocks", 4, "dim")},  # the refiner's blocks first
    ),
    # Of image tokens or of all: rotary tables are theirs. Outputs are the hints, times the scale, then the control
    # tokens as they left the last block.
    Program.CONTROL_REFINER: Signature(
        inputs={
            "control": ("control_batch", "tokens", "dim"),
            "tokens": ("batch", "tokens", "dim"),
            "modulation": ("refiner_blocks", 4, "dim"),
            "cos": (1, "tokens", "half_head"),
            "sin": (1, "tokens", "half_head"),
            "scale": (1,),
        },
        outputs={"control_out": ("batch", "tokens", "dim")},
    ),
    Program.CONTROL_LAYERS: Signature(
        inputs={
            "control": ("control_batch", "tokens", "dim"),
            "tokens": ("batch", "tokens", "dim"),
            "modulation": ("layer_blocks", 4, "dim"),
            "cos": (1, "tokens", "half_head"),
            "sin": (1, "tokens", "half_head"),
            "scale": (1,),
        },
        outputs={"control_out": ("batch", "tokens", "dim")},
    ),
}


_HINT = "hint."


def hint_name(index: int) -> str:
    """The name of a hint: as an input, by the block that it is added after; as an output, by its number."""
    return f"{_HINT}{index}"


def is_hint(name: str) -> bool:
    """Whether an input or output of a program is a hint."""
    return name.startswith(_HINT)
