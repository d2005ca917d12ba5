"""Bodies of A1111's API: what its clients send, and how it is read for a distilled model.

A1111's clients often cannot be configured: they send 20 or more steps, a CFG scale of 4.5 or 7, and samplers of other
models. A Turbo model is made for few steps without guidance, so that it gets its own defaults instead, and the answer
says so. With `as_asked`, everything is done as it was asked for, or refused.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from zimage_runtime.errors import RequestError
from zimage_runtime.model.sampling_names import SamplerName, SchedulerName

from ..orders import MaskKind, Wanted
from ..pictures import from_base64
from ..refusals import InvalidError
from ..service import Service

MOST_TURBO_STEPS = 12
AUTOMATIC = "Automatic"
"""A1111's name for a model's own schedule."""

_LORA = re.compile(r"<lora:([^:<>]{1,200})(?::([^:<>]{0,20}))?(?::[^<>]{0,200})?>")
_SEPARATORS = re.compile(r"[\s_\-]+")


class GenerationBody(BaseModel):
    """What both routes take. Unknown fields are ignored; what is left out gets the bundle's default."""

    model_config = ConfigDict(extra="ignore")
    prompt: str | None = ""
    negative_prompt: str | None = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    sampler_name: str | None = None
    sampler_index: str | None = Field(None, description="The same, in older versions of A1111.")
    scheduler: str | None = None
    seed: int | None = Field(-1, description="A random one where it is -1.")
    subseed: int | None = -1
    subseed_strength: float | None = 0
    batch_size: int | None = 1
    n_iter: int | None = 1
    enable_hr: bool | None = False
    send_images: bool | None = True


class TextBody(GenerationBody):
    """`POST /sdapi/v1/txt2img`."""


class ImageBody(GenerationBody):
    """`POST /sdapi/v1/img2img`."""

    init_images: list[str] | None = Field(None, description="One image: base64 or a data URL.")
    mask: str | None = Field(None, description="White areas are repainted.")
    inpainting_mask_invert: int | None = 0
    denoising_strength: float | None = 0.75


@dataclass(frozen=True)
class Read:
    """A body as it will be run, and what was done otherwise than it asks, a line each."""

    wanted: Wanted
    notes: tuple[str, ...]
    steps: int
    cfg_scale: float


def read(service: Service, body: GenerationBody) -> Read:
    """A body as it will be run. Raises `InvalidError`."""
    lenient = not service.settings.as_asked
    turbo = lenient and service.turbo
    defaults, notes = service.manifest.defaults, []
    steps, cfg_scale = body.steps, body.cfg_scale
    if turbo and steps is not None and steps > MOST_TURBO_STEPS:
        notes.append(f"steps: {defaults.steps} instead of {steps}, as this model is made for few")
        steps = defaults.steps
    if turbo and cfg_scale is not None and cfg_scale != 1:
        notes.append(f"CFG scale: {defaults.cfg_scale:g} instead of {cfg_scale:g}, as this model needs no guidance")
        cfg_scale = defaults.cfg_scale
    sampler = _named(body.sampler_name or body.sampler_index, SamplerName, "sampler", lenient, notes)
    scheduler = _named(body.scheduler, SchedulerName, "scheduler", lenient, notes)
    if body.enable_hr:
        if not lenient:
            raise InvalidError("enable_hr: this server has no second pass at a higher resolution")
        notes.append("enable_hr: there is no second pass at a higher resolution; ask for a larger image")
    if (body.width is None) != (body.height is None):
        raise InvalidError("give width and height, or neither")
    prompt, loras = _without_loras(body.prompt or "")
    wanted = Wanted(
        prompt=prompt,
        negative=_without_loras(body.negative_prompt or "")[0],
        size=None if body.width is None or body.height is None else (body.width, body.height),
        steps=steps,
        cfg_scale=cfg_scale,
        sampler=sampler,
        scheduler=scheduler,
        seed=_seed(body.seed),
        count=_positive("batch_size", body.batch_size) * _positive("n_iter", body.n_iter),
        variation=_variation(body),
        loras=service.loras.resolved(loras),
        **(_sources(body) if isinstance(body, ImageBody) else {}),
    )
    return Read(wanted, tuple(notes), steps or defaults.steps, defaults.cfg_scale if cfg_scale is None else cfg_scale)


def _sources(body: ImageBody) -> dict[str, Any]:
    images = body.init_images or []
    if len(images) != 1:
        raise InvalidError(f"init_images: this model starts from one image, not {len(images)}")
    try:
        return {
            "image": from_base64(images[0], "init_images"),
            "mask": from_base64(body.mask, "mask") if body.mask else None,
            "mask_kind": MaskKind.BLACK if body.inpainting_mask_invert else MaskKind.WHITE,
            "strength": body.denoising_strength,
        }
    except RequestError as error:
        raise InvalidError(str(error)) from None


def _named(given: str | None, known: type[StrEnum], what: str, lenient: bool, notes: list[str]) -> str | None:
    """One of our names, for A1111's or our own in any case; None is the default, also for what is unknown."""
    if not given or (known is SchedulerName and _plain(given) == _plain(AUTOMATIC)):
        return None
    for one in known:
        if _plain(given) in (_plain(one.value), _plain(getattr(one, "label", None) or one.value)):
            return one.value
    names = ", ".join(labels(known))
    if not lenient:
        raise InvalidError(f"{what} {given!r} is unknown; there are: {names}")
    notes.append(f"{what}: the default instead of {given!r}, which is none of {names}")
    return None


def _plain(name: str) -> str:
    return _SEPARATORS.sub(" ", name.strip().lower())


def labels(known: Iterable[StrEnum]) -> list[str]:
    """A1111's names."""
    return [getattr(one, "label", None) or AUTOMATIC for one in known]


def _seed(given: int | None) -> int | None:
    return None if given is None or given == -1 else given


def _positive(name: str, given: int | None) -> int:
    number = 1 if given is None else given
    if number < 1:
        raise InvalidError(f"{name} must be at least 1, not {number}")
    return number


def _variation(body: GenerationBody) -> tuple[int, float] | None:
    if not body.subseed_strength:
        return None
    seed = _seed(body.subseed)
    if seed is None:
        import secrets

        seed = secrets.randbelow(2**32)
    return seed, body.subseed_strength


def _without_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without its ``<lora:NAME:WEIGHT>``, and those. Raises `InvalidError` for a weight that is no number."""
    found = []
    for match in _LORA.finditer(prompt):
        try:
            found.append((match[1].strip(), float(match[2]) if match[2] else 1.0))
        except ValueError:
            raise InvalidError(f"{match[0]}: {match[2]!r} is not a weight") from None
    return " ".join(_LORA.sub(" ", prompt).split()) if found else prompt, found
