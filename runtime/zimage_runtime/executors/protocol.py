"""What a device must be able to do. numpy arrays cross this border; what is large may stay on the other side."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..arrays import FloatArray
from ..model.geometry import ImageGeometry, Rotary
from ..model.programs import Program

if TYPE_CHECKING:
    from ..tiles.kernels import TileKernels


@dataclass(frozen=True)
class Conditioning:
    """All that one prompt, size and schedule fix, before the first step."""

    hidden_states: FloatArray  # [1, tokens, hidden_size], from the text encoder
    timesteps: FloatArray  # [steps]
    image_rotary: Rotary  # [1, image_tokens, head_dim / 2]
    caption_rotary: Rotary  # [1, caption_tokens, head_dim / 2]


class Plan(Protocol):
    """What an executor will do about memory, for one request."""

    @property
    def keep_all(self) -> bool:
        """Whether every program may stay loaded at once."""

    @property
    def tiled(self) -> bool:
        """Whether the image is decoded in tiles on the host, because the decoder as one program does not fit."""

    @property
    def encodes_tiled(self) -> bool:
        """The same for the image to start from."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it, a line each."""


class Denoiser(Protocol):
    """The steps of one conditioning; caption tokens and tables stay on the device for as long as it lives."""

    def __call__(self, latents: FloatArray, step: int) -> FloatArray:
        """The velocity d latents / d sigma at a step. [batch, channels, height / 8, width / 8], in and out."""


class Executor(Protocol):
    """Runs the stages of one bundle. Every method loads what it needs and may raise `ExecutorError`."""

    @property
    def name(self) -> str:
        """The executor's name on the command line."""

    def plan(self, geometry: ImageGeometry, prompt_tokens: int, batch_size: int = 1, *, encodes: bool = False) -> Plan:
        """How a request will run, before anything is loaded. `encodes` says that there is an image to start from.

        Raises `MemoryLimitError` where it does not fit.
        """

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        """Prompt embeddings [1, tokens, hidden_size] → hidden states of the last but one layer, same shape."""

    def prepare(self, conditioning: Conditioning) -> Denoiser:
        """Refines the caption and makes the modulation table: what is done once per prompt."""

    def decode(self, latents: FloatArray) -> FloatArray:
        """Unscaled latents [batch, channels, h, w] → images [batch, 3, 8h, 8w], about -1 to 1."""

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Images [batch, 3, height, width] in -1 to 1 → mean and log-variance [batch, channels, h, w]."""

    def tile_kernels(self) -> "TileKernels":
        """What computes the tiles of an image that is decoded or encoded in tiles."""

    def release(self, *programs: Program) -> None:
        """Frees what the programs hold; without arguments, everything."""
