"""What is asked of the pipeline, and what it reports while it generates."""

import operator
import os
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

from .arrays import FloatArray
from .errors import RequestError
from .images.metadata import ImageInfo
from .images.source_image import ImageInput
from .model.noise import MAX_SEED
from .model.schedule import MAX_STEPS

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_COUNT = 10_000
"""Images of one request."""


@dataclass(frozen=True)
class Request:
    """Everything that one call asks for. What is None gets the bundle's default.

    Raises `RequestError` for a value of another type or out of range. What depends on the bundle (whether the model
    has positions for a size, say) is checked by `Pipeline.prepare`.
    """

    prompt: str  # any text, also empty; beyond 512 tokens it is cut
    _: KW_ONLY
    size: tuple[int, int] | None = None  # width and height in pixels, multiples of 16
    steps: int | None = None  # of the schedule
    seed: int | None = None  # 0 to 2**32 - 1; None for a random one
    count: int = 1  # images, with the seeds `seed`, `seed` + 1, …
    batch_size: int = 1  # images that are denoised in one call
    image: ImageInput | None = None  # a source image: a file's path, or Pillow's
    strength: float | None = None  # how far from the source image, above 0 and up to 1; 0.6, with a mask 1
    mask: ImageInput | None = None  # white areas are repainted
    mask_grow: int = 0  # pixels by which white areas are widened

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise RequestError(f"prompt must be a string, not {type(self.prompt).__name__}")
        if self.size is not None:
            _check_size(self.size)
        for name, least, most in (
            ("steps", 1, MAX_STEPS),
            ("seed", 0, MAX_SEED),
            ("count", 1, MAX_COUNT),
            ("batch_size", 1, None),
            ("mask_grow", 0, None),
        ):
            value = getattr(self, name)
            if value is not None:
                _check_integer(name, value, least, most)
        if self.seed is not None and self.seed + self.count - 1 > MAX_SEED:
            raise RequestError(f"seeds must be 0 to {MAX_SEED}, not {self.seed} to {self.seed + self.count - 1}")
        if self.strength is not None and (isinstance(self.strength, bool) or not _is_real(self.strength)):
            raise RequestError(f"strength must be a number above 0 and up to 1, not {self.strength!r}")
        if self.image is None and (self.strength is not None or self.mask is not None):
            raise RequestError("strength and mask need a source image; give one as image")


def _check_size(size: object) -> None:
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise RequestError(f"size must be (width, height) in pixels, not {size!r}")
    for name, side in zip(("size: width", "size: height"), size, strict=True):
        _check_integer(name, side, None, None)


def _check_integer(name: str, value: object, least: int | None, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise RequestError(f"{name} must be a whole number, not {value!r}")
    number = operator.index(value)
    if (least is not None and number < least) or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise RequestError(f"{name} must be {limits}, not {number}")


def _is_real(value: object) -> bool:
    return isinstance(value, Real)


@dataclass(frozen=True)
class NoticeEvent:
    """Something that the user should know about how the image will be generated."""

    text: str  # one line
    warning: bool = False  # it is not what the user would expect, so it is said even when progress is not shown


@dataclass(frozen=True)
class EncodeEvent:
    """The source image is encoded; only where there is one."""

    seconds: float  # that encoding took


@dataclass(frozen=True)
class CaptionEvent:
    """The prompt is encoded."""

    tokens: int  # of the prompt in its template
    cut_tokens: int  # beyond the 512 that the model sees
    seconds: float  # that it took


@dataclass(frozen=True)
class StepEvent:
    """A denoising step is done, for all images of a batch."""

    seeds: tuple[int, ...]
    step: int  # from 1
    steps: int
    latents: FloatArray  # [batch, channels, height / 8, width / 8]; the caller must not write to them
    seconds: float  # that the step took


@dataclass(frozen=True)
class ImageEvent:
    """An image is decoded."""

    seed: int
    image: "Image"
    latents: FloatArray  # [channels, height / 8, width / 8], after the last step
    seconds: float  # that decoding took
    info: ImageInfo  # what decides the image, for its metadata


Event = NoticeEvent | EncodeEvent | CaptionEvent | StepEvent | ImageEvent


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage took, loading included; one entry per step and per image."""

    caption: float
    steps: tuple[float, ...]
    decode: tuple[float, ...]
    total: float
    encode: float = 0.0  # of the source image


@dataclass(frozen=True)
class Result:
    """What `generate` returns: as many images as seeds."""

    images: list["Image"]
    seeds: list[int]
    timings: Timings
    infos: list[ImageInfo]  # what decides each image

    def save(self, path: str | os.PathLike[str], *, metadata: bool = True, overwrite: bool = True) -> list[Path]:
        """Writes the images as PNG, JPEG or WebP and returns their paths.

        With `metadata`, the files say how they were made: `zimage-rt run --replay FILE` generates them again. A folder
        gets zimage-SEED.png; with several images, -SEED is added to the name. Raises `RequestError` for a path that
        cannot serve and `OSError` for a file that cannot be written.
        """
        from .images.outputs import save_images

        return save_images(self.images, self.infos, path, metadata=metadata, overwrite=overwrite)
