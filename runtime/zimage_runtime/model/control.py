"""A ControlNet in numbers: the published *Union* and *Tile* files of Z-Image ("Fun", versions 1.0 to 2.1).

It has blocks like the model's, each with a projection whose output, a *hint*, is added to the model's tokens after one
of its layers. Version 1.0 has plain blocks that refine the control tokens. In 2.0 the layers refine them too, and in
2.1 blocks that give hints of their own, which go to the ControlNet's own copy of the tokens.

Source: ``controlnet_z_image.py`` in diffusers.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from ..checked_json import Fields
from ..errors import ConfigError, RequestError
from .config import ADALN_WIDTH, PATCH_SIZE, TransformerConfig, ffn_width
from .programs import Program

COMPONENT = "controlnet"

LAYERS_STEM, REFINER_STEM = "control_layers", "control_noise_refiner"
"""The names of its blocks, before their numbers."""

EMBEDDER = f"control_all_x_embedder.{PATCH_SIZE}-1"
BEFORE, AFTER = "before_proj", "after_proj"
"""The linears that a control block has besides: the first block's input, and each block's hint."""


class Refiner(StrEnum):
    """What refines the control tokens before the layers."""

    PLAIN = "plain"  # blocks without hints, on the control tokens alone: version 1.0
    LAYERS = "layers"  # the layers themselves: version 2.0
    CONTROL = "control"  # control blocks of its own: versions from 2.1


@dataclass(frozen=True)
class ControlConfig:
    """The dimensions of a ControlNet."""

    version: str  # as published: 1.0, 2.0, 2.1 or 2.1-lite
    dim: int
    n_heads: int
    channels: int  # of the control latents
    latent_channels: int  # of the model's latents: as many, or with a mask and an image to inpaint twice and 1
    places: tuple[int, ...]  # the layers of the model after which hints are added
    refiner: Refiner
    n_refiner_layers: int  # of the model, which hints of the refiner are added after
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the SwiGLU layer."""
        return ffn_width(self.dim)

    @property
    def adaln_dim(self) -> int:
        """Width of the timestep embedding."""
        return min(self.dim, ADALN_WIDTH)

    @property
    def patch_dim(self) -> int:
        """Values in one token of the control latents."""
        return PATCH_SIZE * PATCH_SIZE * self.channels

    @property
    def inpaints(self) -> bool:
        """Whether it reads a mask and an image to inpaint."""
        return self.channels == 2 * self.latent_channels + 1

    @property
    def refiner_blocks(self) -> tuple[str, ...]:
        """The names of the refiner's own blocks."""
        return () if self.refiner is Refiner.LAYERS else _names(REFINER_STEM, self.n_refiner_layers)

    @property
    def layer_blocks(self) -> tuple[str, ...]:
        """The names of the layers' blocks."""
        return _names(LAYERS_STEM, len(self.places))

    @property
    def blocks(self) -> tuple[str, ...]:
        """All of them, in the order of the modulation table."""
        return self.refiner_blocks + self.layer_blocks

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs that it consists of."""
        own = () if self.refiner is Refiner.LAYERS else (Program.CONTROL_REFINER,)
        return Program.CONTROL_TOKENS, Program.CONTROL_MODULATION, *own, Program.CONTROL_LAYERS

    @property
    def refining(self) -> Program:
        """The program that refines the control tokens."""
        return Program.CONTROL_LAYERS if self.refiner is Refiner.LAYERS else Program.CONTROL_REFINER

    @property
    def refiner_hints(self) -> int:
        """Hints for the ControlNet's own copy of the refined tokens: one for each of the model's noise refiners."""
        return 0 if self.refiner is Refiner.PLAIN else self.n_refiner_layers

    def check_fits(self, model: TransformerConfig, where: object) -> None:
        """Raises `RequestError` unless the ControlNet is for a model of these dimensions."""
        ours = (self.dim, self.n_heads, self.latent_channels, self.n_refiner_layers)
        theirs = (model.dim, model.n_heads, model.in_channels, model.n_refiner_layers)
        if ours != theirs:
            names = ("width", "heads", "latent channels", "noise refiners")
            wrong = [f"{name} {o}, not {t}" for name, o, t in zip(names, ours, theirs, strict=True) if o != t]
            raise RequestError(f"{where}: is a ControlNet for another model: {'; '.join(wrong)}")
        if max(self.places) >= model.n_layers:
            raise RequestError(
                f"{where}: is a ControlNet for another model: it adds to layer {max(self.places)}, and the last is "
                f"{model.n_layers - 1}"
            )

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """From a manifest. Raises `ConfigError`."""
        refiner = fields.text("refiner")
        if refiner not in list(Refiner):
            raise fields.fail("refiner", f"one of {', '.join(Refiner)}")
        places = fields.raw("places")
        ordered = isinstance(places, list) and all(type(place) is int and place >= 0 for place in places)
        if not ordered or not places or places != sorted(set(places)):
            raise fields.fail("places", "the numbers of layers, in order")
        config = cls(
            version=fields.text("version"),
            dim=fields.integer("dim"),
            n_heads=fields.integer("n_heads"),
            channels=fields.integer("channels"),
            latent_channels=fields.integer("latent_channels"),
            places=tuple(places),
            refiner=Refiner(refiner),
            n_refiner_layers=fields.integer("n_refiner_layers"),
            norm_eps=fields.number("norm_eps", 1e-5),
        )
        if config.dim % config.n_heads:
            raise ConfigError(f"{fields.where}: dim must be a multiple of n_heads")
        if not config.inpaints and config.channels != config.latent_channels:
            raise fields.fail("channels", "as many as latent_channels, or twice as many and 1")
        return config


def _names(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}.{index}" for index in range(count))
