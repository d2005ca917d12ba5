"""What is asked of the pipeline, and what it reports while it generates."""

import math
import operator
import os
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

from .adapters.given import LoraInput, given_loras
from .arrays import FloatArray
from .errors import RequestError
from .images.metadata import ImageInfo
from .images.source_image import ImageInput
from .model.control_type import ControlType
from .model.noise import MAX_SEED
from .model.preview_map import PreviewMap
from .model.sampling_names import SamplerName, SchedulerName
from .model.schedule import MAX_STEPS

if TYPE_CHECKING:
    from PIL.Image import Image

NO_PREVIEWS = "the bundle was made before there were previews; export it again"

MAX_COUNT = 10_000
"""Images of one request."""

DEFAULT_CONTROL_SCALE = 0.75
"""diffusers' default; the published files are made for 0.65 to 1."""

MOST_CONTROL_SCALE = 10.0


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
    seed: int | None = None  # 0 to 2**64 - 1; None for a random one
    count: int = 1  # images, with the seeds `seed`, `seed` + 1, …
    batch_size: int = 1  # images that are denoised in one call
    image: ImageInput | None = None  # a source image: a file's path, or Pillow's
    strength: float | None = None  # how far from the source image, above 0 and up to 1; 0.6, with a mask 1
    mask: ImageInput | None = None  # white areas are repainted
    mask_grow: int = 0  # pixels by which white areas are widened
    cfg_scale: float | None = None  # of guidance, as A1111 and ComfyUI count: 1 is none; diffusers' is 1 less
    negative: str = ""  # what the image is guided away from
    cfg_normalization: bool = False  # guidance makes no velocity longer than it was
    cfg_truncation: float = 1.0  # the share of the schedule, 0 to 1, after which steps are not guided
    sampler: str = SamplerName.EULER  # a name from `SamplerName`
    scheduler: str = SchedulerName.MODEL  # a name from `SchedulerName`
    shift: float | None = None  # of the schedule, in place of the model's own: above 0
    variation: tuple[int, float] | None = None
    """Another seed and its share of the noise, above 0 and up to 1; several images then vary that seed, not `seed`."""

    loras: Iterable[LoraInput] = ()  # files, each with or without a weight: "a.safetensors", ("b.safetensors", 0.8)
    lora_allow_unused: bool = False  # leave out tensors of theirs that belong to nothing in the model
    control: ImageInput | None = None  # what a ControlNet reads: edges, depth, a pose, …
    controlnet: str | os.PathLike[str] | None = None  # the ControlNet's folder, which `zimage-export controlnet` makes
    control_type: str | None = None  # a name from `ControlType`: what is made of the control image first
    control_scale: float = DEFAULT_CONTROL_SCALE  # that the ControlNet's hints are multiplied by; 0 is none
    control_start: float = 0.0  # the share of the steps before which, …
    control_end: float = 1.0  # … and after which, they are not added

    def __post_init__(self) -> None:
        object.__setattr__(self, "loras", given_loras(self.loras))
        for name in ("prompt", "negative"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} must be a string, not {type(getattr(self, name)).__name__}")
        if self.size is not None:
            _check_size(self.size)
        for name, least, most, may_be_none in (
            ("steps", 1, MAX_STEPS, True),
            ("seed", 0, MAX_SEED, True),
            ("count", 1, MAX_COUNT, False),
            ("batch_size", 1, None, False),
            ("mask_grow", 0, None, False),
        ):
            value = getattr(self, name)
            if value is not None or not may_be_none:
                _check_integer(name, value, least, most)
        if self.variation is not None:
            _check_variation(self.variation, int(self.count))
        elif self.seed is not None:
            last = int(self.seed) + int(self.count) - 1  # as Python's integers: numpy's wrap around
            if last > MAX_SEED:
                raise RequestError(f"seeds must be 0 to {MAX_SEED}, not {self.seed} to {last}")
        if self.strength is not None and (isinstance(self.strength, bool) or not _is_real(self.strength)):
            raise RequestError(f"strength must be a number above 0 and up to 1, not {self.strength!r}")
        if self.cfg_scale is not None and not (_is_real(self.cfg_scale) and 1 <= self.cfg_scale < math.inf):
            raise RequestError(f"cfg_scale must be a number of at least 1 (no guidance), not {self.cfg_scale!r}")
        if not isinstance(self.cfg_normalization, bool):
            raise RequestError(f"cfg_normalization must be true or false, not {self.cfg_normalization!r}")
        if not (_is_real(self.cfg_truncation) and 0 <= self.cfg_truncation <= 1):
            raise RequestError(f"cfg_truncation must be a number from 0 to 1, not {self.cfg_truncation!r}")
        _check_name("sampler", self.sampler, SamplerName)
        _check_name("scheduler", self.scheduler, SchedulerName)
        if self.shift is not None and not (_is_real(self.shift) and 0 < self.shift < math.inf):
            raise RequestError(f"shift must be a number above 0, not {self.shift!r}")
        if self.image is None and (self.strength is not None or self.mask is not None):
            raise RequestError("strength and mask need a source image; give one as image")
        if self.mask is None and self.mask_grow:
            raise RequestError("mask_grow widens a mask; give one as mask")
        for name in ("image", "mask", "control"):
            _check_image(name, getattr(self, name))
        _check_control(self)


def _check_size(size: object) -> None:
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise RequestError(f"size must be (width, height) in pixels, not {size!r}")
    for name, side in zip(("size: width", "size: height"), size, strict=True):
        _check_integer(name, side, None, None)


def _check_image(name: str, value: object) -> None:
    if value is None or isinstance(value, str | os.PathLike):
        return
    from PIL import Image

    if not isinstance(value, Image.Image):
        raise RequestError(f"{name} must be a file's path or a Pillow image, not {type(value).__name__}")


def _check_control(request: Request) -> None:
    if (request.control is None) != (request.controlnet is None):
        raise RequestError("control and controlnet go together: give the image and the ControlNet's folder")
    if not isinstance(request.controlnet, str | os.PathLike | None):
        raise RequestError(f"controlnet must be a folder's path, not {type(request.controlnet).__name__}")
    if request.control_type is not None:
        _check_name("control_type", request.control_type, ControlType)
    if not (_is_real(request.control_scale) and 0 <= request.control_scale <= MOST_CONTROL_SCALE):
        raise RequestError(
            f"control_scale must be a number from 0 to {MOST_CONTROL_SCALE:g}, not {request.control_scale!r}"
        )
    start, end = request.control_start, request.control_end
    if not (_is_real(start) and _is_real(end) and 0 <= start < end <= 1):
        raise RequestError(f"control_start must be less than control_end, both from 0 to 1, not {start!r} and {end!r}")
    settings = (request.control_type, request.control_scale, start, end)
    if request.control is None and settings != (None, DEFAULT_CONTROL_SCALE, 0, 1):
        raise RequestError("control_type, control_scale, control_start and control_end need a control image")


def _check_name(name: str, value: object, known: type[StrEnum]) -> None:
    if value not in list(known):
        raise RequestError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _check_variation(variation: object, count: int) -> None:
    if not isinstance(variation, tuple | list) or len(variation) != 2:
        raise RequestError(f"variation must be (seed, strength), not {variation!r}")
    seed, strength = variation
    _check_integer("the variation's seed", seed, 0, MAX_SEED + 1 - count)
    if not (_is_real(strength) and 0 < strength <= 1):
        raise RequestError(f"the variation's strength must be a number above 0 and up to 1, not {strength!r}")


def _check_integer(name: str, value: object, least: int | None, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise RequestError(f"{name} must be a whole number, not {value!r}")
    number = operator.index(value)
    if (least is not None and number < least) or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise RequestError(f"{name} must be {limits}, not {number}")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class NoticeEvent:
    """Something that the user should know about how the image will be generated."""

    text: str  # one line
    warning: bool = False  # it is not what the user would expect, so it is said even when progress is not shown


@dataclass(frozen=True)
class EncodeEvent:
    """The source image is encoded, and the control image; only where there is one."""

    seconds: float  # that encoding took


@dataclass(frozen=True)
class CaptionEvent:
    """The prompt is encoded, and the negative prompt if there is guidance."""

    tokens: int  # of the prompt in its template
    cut_tokens: int  # beyond the 512 that the model sees
    seconds: float  # that it took
    negative_cut_tokens: int = 0  # the same of the negative prompt


@dataclass(frozen=True)
class StepEvent:
    """A denoising step is done, for all images of a batch."""

    seeds: tuple[int, ...]
    step: int  # from 1
    steps: int
    latents: FloatArray  # [batch, channels, height / 8, width / 8]; the caller must not write to them
    seconds: float  # that the step took
    estimate: FloatArray  # of the same shape: what the model takes the image's latents to be
    colours: PreviewMap | None = None  # the bundle's map from latents to colours

    def preview(self, index: int = 0) -> "Image":
        """The estimate of one image of the batch as a small image, an eighth as wide and high. Takes milliseconds.

        Raises `RequestError` for a bundle without a map for previews.
        """
        from .images.preview import preview_image

        if self.colours is None:
            raise RequestError(NO_PREVIEWS)
        return preview_image(self.estimate[index], self.colours)


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
