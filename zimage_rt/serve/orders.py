"""What crosses the pipe between the web process and the engine, in both directions: frozen values that are pickled."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from zimage_runtime.events import Request
from zimage_runtime.images.formats import ImageFormat
from zimage_runtime.images.source_image import ImageInput


class MaskKind(StrEnum):
    """Which areas of a mask are repainted."""

    WHITE = "white"
    BLACK = "black"
    TRANSPARENT = "transparent"  # OpenAI's


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a client asks for, in one form for all APIs. What is None gets the bundle's default."""

    prompt: str
    negative: str = ""
    size: tuple[int, int] | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    sampler: str | None = None
    scheduler: str | None = None
    shift: float | None = None
    seed: int | None = None
    count: int = 1
    variation: tuple[int, float] | None = None
    loras: tuple[tuple[str, float], ...] = ()  # paths and weights
    image: bytes | None = None  # an image file's
    mask: bytes | None = None
    mask_kind: MaskKind = MaskKind.WHITE
    mask_grow: int = 0
    strength: float | None = None
    control: bytes | None = None  # what a ControlNet reads
    controlnet: str | None = None  # its folder
    control_type: str | None = None
    control_scale: float | None = None
    control_start: float = 0.0
    control_end: float = 1.0

    @property
    def source_bytes(self) -> int:
        """Of the image files that came with it."""
        return len(self.image or b"") + len(self.mask or b"") + len(self.control or b"")

    def without_sources(self) -> "Wanted":
        """The same without image files, which may take megabytes."""
        return replace(self, image=None, mask=None, control=None)

    def request(self, image: ImageInput | None, mask: ImageInput | None, control: ImageInput | None) -> Request:
        """The same as the pipeline takes it, with these as its images. Raises `RequestError`."""
        named = {"sampler": self.sampler, "scheduler": self.scheduler, "control_scale": self.control_scale}
        return Request(
            self.prompt,
            negative=self.negative,
            size=self.size,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            shift=self.shift,
            seed=self.seed,
            count=self.count,
            variation=self.variation,
            loras=self.loras,
            image=image,
            mask=mask,
            mask_grow=self.mask_grow,
            strength=self.strength,
            control=control,
            controlnet=self.controlnet,
            control_type=self.control_type,
            control_start=self.control_start,
            control_end=self.control_end,
            **{name: value for name, value in named.items() if value is not None},  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class Order:
    """A job for the engine."""

    id: str
    wanted: Wanted
    kind: ImageFormat = ImageFormat.PNG
    quality: int | None = None  # of a JPEG or WebP, 0 to 100; None is our own choice
    previews: bool = True  # a small image after each step
    partials: int = 0  # previews at the image's own size and in its format, for OpenAI's partial images


@dataclass(frozen=True)
class Cancel:
    """Stop a job at the next operator."""

    id: str


@dataclass(frozen=True)
class PlanOrder:
    """Plan a request without running it."""

    id: str
    wanted: Wanted


@dataclass(frozen=True)
class Stop:
    """End the engine."""


@dataclass(frozen=True)
class Ready:
    """The pipeline is open."""

    executor: str
    device: str
    takes_lora: bool


@dataclass(frozen=True)
class NotReady:
    """The pipeline cannot be opened, and trying again would not help."""

    message: str


@dataclass(frozen=True)
class Started:
    """A job was checked, planned, and begins."""

    id: str
    steps: int  # of each image
    image_tokens: int  # of each image


@dataclass(frozen=True)
class Noticed:
    """A line for the client that asked."""

    id: str
    text: str


@dataclass(frozen=True)
class Staged:
    """A stage is done."""

    id: str
    stage: str  # encode, caption, decode or write
    seconds: float
    tokens: int = 0  # of the prompt, after the caption


@dataclass(frozen=True)
class Stepped:
    """A step of an image is done."""

    id: str
    index: int  # of the image
    step: int  # from 1
    steps: int
    seconds: float
    preview: bytes | None  # a small JPEG
    partial: bytes | None = None  # the same at the image's size and in its format


@dataclass(frozen=True)
class Made:
    """An image is written."""

    id: str
    index: int
    name: str  # of the file in the output folder
    width: int
    height: int
    seed: int
    settings: dict[str, Any]  # see `gallery.settings_of`
    parameters: str  # A1111's text


@dataclass(frozen=True)
class Ended:
    """A job is over. `error` is None after success."""

    id: str
    error: str | None = None
    refused: bool = False  # the request cannot be run: its sender has to change it
    cancelled: bool = False


@dataclass(frozen=True)
class Planned:
    """The answer to `PlanOrder`."""

    id: str
    fits: bool
    message: str
    document: dict[str, Any] | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Gone:
    """The engine process has ended. Made by the web process when the pipe closes."""

    exit_code: int | None


FromEngine = Ready | NotReady | Started | Noticed | Staged | Stepped | Made | Ended | Planned | Gone
ToEngine = Order | Cancel | PlanOrder | Stop
