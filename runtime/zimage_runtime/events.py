"""What is asked of the pipeline, and what it tells while it generates."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arrays import FloatArray
from .images.source_image import SourceImage
from .model.geometry import ImageGeometry
from .model.schedule import Schedule

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class NoticeEvent:
    """Something that the user should know of how the image will be generated."""

    text: str  # one line


@dataclass(frozen=True)
class EncodeEvent:
    """The image to start from is encoded; only where there is one."""

    seconds: float  # that encoding took


@dataclass(frozen=True)
class CaptionEvent:
    """The prompt is encoded."""

    tokens: int  # of the prompt in its template
    cut_tokens: int  # beyond the 512 that the model sees
    seconds: float  # that it took


@dataclass(frozen=True)
class StepEvent:
    """A denoising step is done."""

    seeds: tuple[int, ...]  # of the images in the batch
    step: int  # counted from 1
    steps: int  # that are taken: fewer than asked for where an image is started from
    latents: FloatArray  # [batch, channels, height / 8, width / 8]; the caller must not write to them
    seconds: float  # that the step took


@dataclass(frozen=True)
class ImageEvent:
    """An image is decoded."""

    seed: int
    image: "Image"
    latents: FloatArray  # [channels, height / 8, width / 8], after the last step
    seconds: float  # that decoding took


Event = NoticeEvent | EncodeEvent | CaptionEvent | StepEvent | ImageEvent


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage took, loading included; one entry a step and an image."""

    caption: float
    steps: tuple[float, ...]
    decode: tuple[float, ...]
    total: float
    encode: float = 0.0  # of the image to start from


@dataclass(frozen=True)
class Result:
    """What `generate` returns: as many images as seeds."""

    images: list["Image"]
    seeds: list[int]
    timings: Timings


@dataclass(frozen=True)
class Request:
    """A request whose values are checked and whose defaults are filled in."""

    prompt: str
    geometry: ImageGeometry
    schedule: Schedule
    seeds: tuple[int, ...]
    batch_size: int = 1
    source: SourceImage | None = None  # the image to start from
    strength: float | None = None  # how far from it, where there is one
    first_step: int = 0  # of the schedule; those before it are left out

    @property
    def steps(self) -> int:
        """Steps that are taken for each image."""
        return self.schedule.steps - self.first_step
