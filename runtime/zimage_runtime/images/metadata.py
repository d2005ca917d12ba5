"""All that decides an image, as one value: the document that replays it, and its settings as A1111 writes them.

A replay document is a JSON object of the fields of `ImageInfo`; a field at its default is left out. ``version`` is the
smallest version that a reader must know. A field that only describes how an image was computed may be ignored and
keeps version 1; a field without which another image would be generated raises it. Readers ignore unknown keys and
refuse unknown versions, so an older release replays whatever it can replay exactly. Versions:

1. an image from a prompt
2. an image from another image, with or without a mask
3. an image from another image, with a mask that was grown
4. an image with guidance, another sampler, schedule or shift, or a variation
5. an image with LoRA
6. an image with a ControlNet

To record one more setting, add a field here, and a row to `_SETTINGS` if A1111 has a name for it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from typing import Annotated, Any, Self, get_args, get_type_hints

from ..checked_json import Fields
from ..errors import ConfigError, RequestError
from ..model.control_type import ControlType
from ..model.noise import MAX_SEED
from ..model.sampling_names import SamplerName, SchedulerName


@dataclass(frozen=True)
class Recorded:
    """How a replay document holds a field of `ImageInfo`."""

    read: Callable[[Fields, str], object]  # the checked value of a key
    since: int = 1  # the first version whose readers know the key; 1 also for a key that readers may ignore


def _any_text(document: Fields, key: str) -> str:
    """A string that may be empty; the request checks what it contains."""
    value = document.raw(key)
    if not isinstance(value, str):
        raise document.fail(key, "a string")
    return value


def _share(document: Fields, key: str) -> float:
    return document.number(key, positive=False)


def _sampler(document: Fields, key: str) -> SamplerName:
    return SamplerName(_name(document, key, SamplerName))


def _scheduler(document: Fields, key: str) -> SchedulerName:
    return SchedulerName(_name(document, key, SchedulerName))


def _control_type(document: Fields, key: str) -> str:
    return _name(document, key, ControlType)


def _name(document: Fields, key: str, known: type[StrEnum]) -> str:
    value = document.text(key)
    if value not in list(known):
        raise document.fail(key, f"one of {', '.join(known)}")
    return value


def _seed(document: Fields, key: str) -> int:
    return document.integer(key, minimum=0, maximum=MAX_SEED)


def _count(document: Fields, key: str) -> int:
    return document.integer(key, minimum=0)


@dataclass(frozen=True)
class LoraInfo:
    """A LoRA that an image was generated with."""

    name: str
    weight: float
    hash: str  # SHA-256 of its tensors, as A1111 counts it


def _loras(document: Fields, key: str) -> tuple[LoraInfo, ...]:
    values = document.raw(key)
    if not isinstance(values, list):
        raise document.fail(key, "a list")
    each = [Fields(value, f"{document.where}: {key}") for value in values]
    return tuple(LoraInfo(f.text("name"), f.number("weight", positive=False), f.text("hash")) for f in each)


@dataclass(frozen=True)
class ImageInfo:
    """All that decides an image."""

    prompt: Annotated[str, Recorded(_any_text)]
    seed: Annotated[int, Recorded(_seed)]
    width: Annotated[int, Recorded(Fields.integer)]  # pixels
    height: Annotated[int, Recorded(Fields.integer)]
    steps: Annotated[int, Recorded(Fields.integer)]
    model: Annotated[str, Recorded(Fields.text)]  # the bundle's name, precision included
    fingerprint: Annotated[str, Recorded(Fields.text)]  # of the bundle
    executor: Annotated[str, Recorded(Fields.text)]
    # for an image that was generated from another one
    strength: Annotated[float | None, Recorded(Fields.number, since=2)] = None
    image: Annotated[str | None, Recorded(Fields.text, since=2)] = None  # SHA-256 of its pixels
    mask: Annotated[str | None, Recorded(Fields.text, since=2)] = None  # the same of the mask, as it was given
    mask_grow: Annotated[int, Recorded(_count, since=3)] = 0  # pixels by which white areas were grown
    # how it was guided
    cfg_scale: Annotated[float, Recorded(Fields.number, since=4)] = 1.0  # 1 is no guidance
    negative: Annotated[str, Recorded(_any_text, since=4)] = ""
    cfg_normalization: Annotated[bool, Recorded(Fields.boolean, since=4)] = False
    cfg_truncation: Annotated[float, Recorded(_share, since=4)] = 1.0
    # how it was sampled
    sampler: Annotated[SamplerName, Recorded(_sampler, since=4)] = SamplerName.EULER
    scheduler: Annotated[SchedulerName, Recorded(_scheduler, since=4)] = SchedulerName.MODEL
    shift: Annotated[float | None, Recorded(Fields.number, since=4)] = None  # in place of the model's own
    variation_seed: Annotated[int | None, Recorded(_seed, since=4)] = None  # whose noise was mixed in
    variation_strength: Annotated[float | None, Recorded(Fields.number, since=4)] = None
    loras: Annotated[tuple[LoraInfo, ...], Recorded(_loras, since=5)] = ()
    # what a ControlNet added
    control: Annotated[str | None, Recorded(Fields.text, since=6)] = None  # SHA-256 of the control image's pixels
    controlnet: Annotated[str | None, Recorded(Fields.text, since=6)] = None  # its name, precision included
    controlnet_hash: Annotated[str | None, Recorded(Fields.text, since=6)] = None  # its fingerprint
    control_type: Annotated[str | None, Recorded(_control_type, since=6)] = None
    control_scale: Annotated[float | None, Recorded(_share, since=6)] = None
    control_start: Annotated[float, Recorded(_share, since=6)] = 0.0
    control_end: Annotated[float, Recorded(_share, since=6)] = 1.0
    # how it was computed; None where that is unknown, as in images of older versions, or does not apply
    program: Annotated[str | None, Recorded(Fields.text)] = None  # the denoiser's, like "cuda-weight-only"
    activation_bits: Annotated[int | None, Recorded(Fields.integer)] = None  # of int8 bundles on the CPU: 7 or 8
    library: Annotated[str | None, Recorded(Fields.text)] = None  # with its version, like "onnxruntime 1.29.0"

    def parameters(self) -> str:
        """The A1111 text: the prompt, the negative prompt if there is one, then a line of settings.

        Values with , : or a newline are JSON-quoted.
        """
        settings = ((name, value(self)) for name, value in _SETTINGS)
        line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings if value is not None)
        negative = f"Negative prompt: {self.negative}\n" if self.negative else ""
        return f"{self.prompt}\n{negative}{line}"

    def replay(self) -> str:
        """The document that `--replay` reads."""
        values = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}
        version = max(_recorded(type(self))[name].since for name in values)
        return json.dumps({"version": version, **values}, default=vars)  # ASCII, so that XML can carry any prompt

    @classmethod
    def from_replay(cls, text: str | bytes, where: str) -> Self:
        """Reads a document of any version up to our own.

        Raises `RequestError` for a document that is damaged or written by a newer version.
        """
        recorded = _recorded(cls)
        try:
            document = Fields(json.loads(text), where)
            if document.integer("version") > max(each.since for each in recorded.values()):
                raise RequestError(f"{where}: written by a newer version; upgrade zimage-rt")
            read = [each.name for each in fields(cls) if each.default is MISSING or each.name in document]
            values: dict[str, Any] = {name: recorded[name].read(document, name) for name in read}
        except ConfigError as error:
            raise RequestError(str(error)) from None
        except (ValueError, RecursionError):
            raise RequestError(f"{where}: its zimage metadata is damaged") from None
        return cls(**values)


def _recorded(kind: type[ImageInfo]) -> Mapping[str, Recorded]:
    """Each field of `kind`, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {each.name: get_args(hints[each.name])[1] for each in fields(kind)}


REPLAY_VERSION = max(each.since for each in _recorded(ImageInfo).values())
"""The newest version that we read."""


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


_SHORT_HASH = 12  # of A1111


def _control_unit(info: ImageInfo) -> str | None:
    """As A1111's extension for ControlNet writes a unit."""
    if info.control_scale is None or info.controlnet is None:
        return None
    return (
        f"Module: {info.control_type or 'none'}, Model: {info.controlnet}, Weight: {info.control_scale:g}, "
        f"Guidance Start: {info.control_start:g}, Guidance End: {info.control_end:g}"
    )


_SETTINGS: tuple[tuple[str, Callable[[ImageInfo], object]], ...] = (
    ("Steps", lambda info: info.steps),
    ("Sampler", lambda info: info.sampler.label),
    ("Schedule type", lambda info: info.scheduler.label),
    ("CFG scale", lambda info: f"{info.cfg_scale:g}"),
    ("Seed", lambda info: info.seed),
    ("Size", lambda info: f"{info.width}x{info.height}"),
    ("Model", lambda info: info.model),
    ("Variation seed", lambda info: info.variation_seed),
    ("Variation seed strength", lambda info: _number(info.variation_strength)),
    ("Denoising strength", lambda info: _number(info.strength)),
    ("Shift", lambda info: _number(info.shift)),
    ("ControlNet 0", lambda info: _control_unit(info)),
    ("Lora hashes", lambda info: ", ".join(f"{one.name}: {one.hash[:_SHORT_HASH]}" for one in info.loras) or None),
)
"""A1111's names and our values, in A1111's order; None is left out."""

_COMPUTED_WITH = {
    "executor": "the {} executor",
    "program": "the program {}",
    "activation_bits": "{}-bit activations",
    "library": "{}",
}
"""What may differ between two runs of one request on one bundle, in words."""


def differences(recorded: ImageInfo, now: ImageInfo) -> list[str]:
    """What differs in how a recorded image was computed and how it is computed now, a line each.

    Only what is known of both is compared. The request and the bundle are not: a replay repeats the one and requires
    the other.
    """
    found = []
    for name, words in _COMPUTED_WITH.items():
        before, after = getattr(recorded, name), getattr(now, name)
        if before is None or after is None or before == after:
            continue
        if name == "program" and recorded.executor != now.executor:
            continue  # each executor has programs of its own
        found.append(
            f"the image was generated with {words.format(before)}, now with {words.format(after)}; pixels may differ"
        )
    return found


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value
