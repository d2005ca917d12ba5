"""Turbo or Base: the same tensors, another schedule and other defaults.

Nothing in the weights says which of the two they are. A folder's scheduler says it (shift 3 or 6), metadata that
trainers write, and the names of the published files. Where these contradict each other, the user decides.

Sources: the published ``scheduler_config.json`` of both; the model card of Z-Image (50 steps, guidance 4 as diffusers
counts it, which is a CFG scale of 5); `modelspec` (Stability-AI/ModelSpec).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from zimage_runtime.model.schedule import DEFAULT_STEPS

from ..errors import CheckpointError


class Variant(StrEnum):
    """The published models that have these tensors."""

    TURBO = "turbo"
    BASE = "base"


@dataclass(frozen=True)
class VariantDefaults:
    """How a variant is meant to be run."""

    steps: int
    cfg_scale: float
    shift: float


DEFAULTS = {
    Variant.TURBO: VariantDefaults(DEFAULT_STEPS, 1.0, 3.0),
    Variant.BASE: VariantDefaults(50, 5.0, 6.0),
}


@dataclass(frozen=True)
class Said:
    """One place that says which variant a model is."""

    variant: Variant
    where: str  # a phrase, for messages


@dataclass(frozen=True)
class Decision:
    """The variant of a checkpoint."""

    variant: Variant
    note: str | None = None  # a line for the user, where nothing said it for the weights themselves


def known_variant(name: str | None) -> Variant | None:
    """A variant by its name; None for one that is not stated or not known."""
    return Variant(name) if name in list(Variant) else None


_TITLES = ("modelspec.title", "modelspec.architecture", "modelspec.implementation", "general.name", "general.basename")
_DETUNED = re.compile(r"de[-_ ]?turbo|de[-_ ]?distill", re.I)
_TURBO = re.compile(r"(?<![a-z])turbo(?![a-z])", re.I)
_BASE = re.compile(r"z[-_ ]?image[-_ ]base(?![a-z])", re.I)
_PLAIN_NAME = re.compile(  # z_image_bf16, z-image-Q8_0: the published name of Base, and how it is stored
    r"z[-_ ]?image(?:[-_.](?:bf16|fp16|fp32|fp8|e[45]m[23](?:fn)?|scaled|mixed|int8|convrot|nvfp4|mxfp8"
    r"|i?q\d(?:_[a-z0-9]+)*|f16|f32))*",
    re.I,
)


def said_by_name(name: str, what: str) -> list[Said]:
    """What a model's or a file's name says, without its suffix."""
    if _DETUNED.search(name):  # made of Turbo, run like Base: its maker says how
        return []
    turbo, base = _TURBO.search(name), _BASE.search(name) or _PLAIN_NAME.fullmatch(name)
    if bool(turbo) == bool(base):
        return []
    return [Said(Variant.TURBO if turbo else Variant.BASE, f"the {what} {name}")]


def said_by_metadata(metadata: Mapping[str, object]) -> list[Said]:
    """What a file's metadata says."""
    found = []
    for key in _TITLES:
        value = metadata.get(key)
        if isinstance(value, str) and not _DETUNED.search(value):
            variant = Variant.TURBO if _TURBO.search(value) else Variant.BASE if _BASE.search(value) else None
            found += [Said(variant, f"the metadata {key} {value!r}")] if variant else []
    return found


def said_by_shift(shift: object, where: Path) -> list[Said]:
    """What a folder's scheduler says."""
    found = [variant for variant, defaults in DEFAULTS.items() if shift == defaults.shift]
    return [Said(variant, f"the shift {shift} of {where}") for variant in found]


def decide(of_weights: Sequence[Said], of_folder: Sequence[Said], given: Variant | None, where: Path) -> Decision:
    """The variant. Raises `CheckpointError` where the places contradict each other and none is given."""
    if given is not None:
        return Decision(given)
    said = [*of_weights, *of_folder]
    first = said[0] if said else None
    other = next((one for one in said if first and one.variant is not first.variant), None)
    if first and other:
        raise CheckpointError(
            f"{where}: {first.where} says {first.variant.value}, but {other.where} says {other.variant.value}: "
            f"give --variant turbo or --variant base"
        )
    if of_weights:
        return Decision(of_weights[0].variant)
    if of_folder:
        return Decision(
            of_folder[0].variant,
            f"{where} does not say whether it is Turbo or Base: taken from "
            f"{of_folder[0].where}, {of_folder[0].variant.value}",
        )
    return Decision(Variant.TURBO, f"nothing says whether {where} is Turbo or Base: taken as turbo (--variant)")
