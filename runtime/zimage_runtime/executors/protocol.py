"""What a device must be able to do. numpy arrays cross this border; what is large may stay on the other side."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..model.geometry import PictureGeometry, Rotary
from ..model.programs import Program

if TYPE_CHECKING:
    from ..tiles.kernels import Kernels

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Conditioning:
    """All that one prompt, size and schedule fix, before the first step."""

    hidden_states: Floats  # [1, tokens, hidden_size], from the text encoder
    timesteps: Floats  # [steps]
    image_rotary: Rotary  # [1, image_tokens, head_dim / 2]
    caption_rotary: Rotary  # [1, caption_tokens, head_dim / 2]


class Plan(Protocol):
    """What an executor will do about memory, for one request."""

    @property
    def keep_all(self) -> bool:
        """Whether every program may stay loaded at once."""

    @property
    def tiled(self) -> bool:
        """Whether the picture is decoded in tiles on the host, because the decoder as one program does not fit."""

    @property
    def encodes_tiled(self) -> bool:
        """The same for the picture to start from."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it, a line each."""


class Denoiser(Protocol):
    """The steps of one conditioning; caption tokens and tables stay on the device for as long as it lives."""

    def __call__(self, latents: Floats, step: int) -> Floats:
        """The velocity d latents / d sigma at a step. [batch, channels, height / 8, width / 8], in and out."""


class Executor(Protocol):
    """Runs the stages of one bundle. Every method loads what it needs and may raise `ExecutorError`."""

    @property
    def name(self) -> str:
        """The executor's name on the command line."""

    def plan(
        self, geometry: PictureGeometry, prompt_tokens: int, batch_size: int = 1, *, encodes: bool = False
    ) -> Plan:
        """How a request will be drawn, before anything is loaded. `encodes` says that there is a picture to start from.

        Raises `MemoryLimitError` where it does not fit.
        """

    def encode_text(self, embeddings: Floats, rotary: Rotary) -> Floats:
        """Prompt embeddings [1, tokens, hidden_size] → hidden states of the last but one layer, same shape."""

    def prepare(self, conditioning: Conditioning) -> Denoiser:
        """Refines the caption and makes the modulation table: what is done once per prompt."""

    def decode(self, latents: Floats) -> Floats:
        """Unscaled latents [batch, channels, h, w] → pictures [batch, 3, 8h, 8w], about -1 to 1."""

    def encode(self, image: Floats) -> tuple[Floats, Floats]:
        """Pictures [batch, 3, height, width] in -1 to 1 → mean and log-variance [batch, channels, h, w]."""

    def tile_kernels(self) -> "Kernels":
        """What computes the tiles of a picture that is decoded or encoded in tiles."""

    def release(self, *programs: Program) -> None:
        """Frees what the programs hold; without arguments, everything."""
