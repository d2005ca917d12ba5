"""What is asked of the pipeline, and what it tells while it draws."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .executors.protocol import Floats
from .images.source_image import SourceImage
from .model.geometry import PictureGeometry
from .model.schedule import Schedule

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class NoticeEvent:
    """Something that the user should know of how the picture will be drawn."""

    text: str  # one line


@dataclass(frozen=True)
class EncodeEvent:
    """The picture to start from is encoded; only where there is one."""

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

    seeds: tuple[int, ...]  # of the pictures in the batch
    step: int  # counted from 1
    steps: int  # that are taken: fewer than asked for where a picture is started from
    latents: Floats  # [batch, channels, height / 8, width / 8]; the caller must not write to them
    seconds: float  # that the step took


@dataclass(frozen=True)
class PictureEvent:
    """A picture is decoded."""

    seed: int
    image: "Image"
    latents: Floats  # [channels, height / 8, width / 8], after the last step
    seconds: float  # that decoding took


Event = NoticeEvent | EncodeEvent | CaptionEvent | StepEvent | PictureEvent


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage took, loading included; one entry a step and a picture."""

    caption: float
    steps: tuple[float, ...]
    decode: tuple[float, ...]
    total: float
    encode: float = 0.0  # of the picture to start from


@dataclass(frozen=True)
class Result:
    """What `generate` returns: as many pictures as seeds."""

    images: list["Image"]
    seeds: list[int]
    timings: Timings


@dataclass(frozen=True)
class Request:
    """A request whose values are checked and whose defaults are filled in."""

    prompt: str
    geometry: PictureGeometry
    schedule: Schedule
    seeds: tuple[int, ...]
    batch_size: int = 1
    source: SourceImage | None = None  # the picture to start from
    strength: float | None = None  # how far from it, where there is one
    first_step: int = 0  # of the schedule; those before it are left out

    @property
    def steps(self) -> int:
        """Steps that are taken for each picture."""
        return self.schedule.steps - self.first_step
