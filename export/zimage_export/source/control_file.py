"""A ControlNet's file: its tensors, and what they say about its version.

The published files have diffusers' names and neither a configuration nor the model. A folder that diffusers saved has a
``config.json``, which then counts. Version 2.0 has tensors of a refiner that are zero and were never trained: its
layers refine the control tokens.

Sources: ``single_file_utils.py`` and ``controlnet_z_image.py`` in diffusers; ``nodes_model_patch.py`` in ComfyUI.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zimage_runtime.checked_json import Fields
from zimage_runtime.errors import ConfigError
from zimage_runtime.model.config import PATCH_SIZE
from zimage_runtime.model.control import AFTER, BEFORE, EMBEDDER, LAYERS_STEM, REFINER_STEM, ControlConfig, Refiner

from ..errors import CheckpointError
from .contents import Contents, read_contents, read_json, set_name
from .foreign import is_lora, other_model
from .kinds import KINDS, find_prefix, parts_in
from .tensors import TensorSource
from .weights import Weights

LATENT_CHANNELS = 16
"""Of Z-Image's latents. A ControlNet that inpaints reads twice as many and a mask."""

_GOOD = "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors"
_SAVED = "diffusion_pytorch_model.safetensors"
_CLASS = "ZImageControlNetModel"
_REFINERS = 2  # of the published model
_WIDTH = 3840
_PLACES: Mapping[int, tuple[int, ...]] = {6: tuple(range(0, 30, 5)), 15: tuple(range(0, 30, 2)), 3: (0, 10, 20)}
"""By the number of control layers: the published model's layers after which hints are added (VideoX-Fun's
``config/z_image``)."""

_LITE = 6  # control layers, below which a version is called that

_CONTROLNETS = (  # names that only these have, and what they are
    (re.compile(r"(^|\.)(control_model\.|input_hint_block\.|zero_convs\.)"), "a Stable Diffusion ControlNet"),
    (re.compile(r"(^|\.)controlnet_(cond_embedding|down_blocks|mid_block)\b"), "a Stable Diffusion ControlNet"),
    (re.compile(r"(^|\.)controlnet_(single_)?blocks\."), "a ControlNet for FLUX, Stable Diffusion 3 or Qwen-Image"),
    (re.compile(r"(^|\.)(controlnet_x_embedder|pos_embed_input)\."), "a ControlNet for FLUX or Stable Diffusion 3"),
    (re.compile(r"^(ip_adapter|image_proj)\b"), "an IP-Adapter"),
)


@dataclass(frozen=True)
class ControlFile:
    """A ControlNet, opened: its dimensions, and its tensors on demand."""

    name: str
    config: ControlConfig
    weights: Weights


def open_control_file(path: Path, places: Sequence[int] | None = None) -> ControlFile:
    """Opens a safetensors file, or a folder that diffusers saved. `places` are the model's layers that get hints.

    Only headers are read, and a tensor or two. Raises `CheckpointError` for what is no ControlNet of Z-Image.
    """
    file = path / _SAVED if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise CheckpointError(f"{path}: contains no {_SAVED}; give the ControlNet's safetensors file")
    contents = read_contents(file)
    tensors = _control_tensors(contents)
    saved = _saved_config(file)
    weights = Weights(file, tensors)
    name = path.resolve().name if path.is_dir() else set_name(file)
    try:
        return ControlFile(name, _config(weights, saved, places), weights)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _control_tensors(contents: Contents) -> dict[str, TensorSource]:
    """The tensors without what precedes their names. Raises `CheckpointError` for a file of another kind."""
    tensors, path = contents.tensors, contents.where
    prefix = find_prefix(tensors, (f"{EMBEDDER}.weight",))
    if prefix is None:
        raise _refusal(tensors, path)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _refusal(tensors: Mapping[str, TensorSource], path: Path) -> CheckpointError:
    if name := next(filter(is_lora, tensors), None):
        return CheckpointError(
            f"{path}: is a LoRA, not a ControlNet (it contains {name}); give it to `zimage-rt run --lora`"
        )
    if parts := [KINDS[part].title for part in parts_in(tensors)]:
        return CheckpointError(f"{path}: contains a {' and a '.join(parts)}, not a ControlNet; expected {_GOOD}")
    for pattern, what in _CONTROLNETS:
        if name := next(filter(pattern.search, tensors), None):
            return CheckpointError(f"{path}: is {what} (it contains {name}), not one for Z-Image; expected {_GOOD}")
    if found := other_model(tensors):
        what, name = found
        return CheckpointError(f"{path}: is {what} (it contains {name}), not a ControlNet; expected {_GOOD}")
    return CheckpointError(f"{path}: contains no ControlNet of Z-Image, which would have {EMBEDDER}.weight")


def _saved_config(file: Path) -> Fields | None:
    """What diffusers saved beside a file; None where there is nothing of the kind."""
    path = file.with_name("config.json")
    if file.name != _SAVED or not path.is_file():
        return None
    fields = Fields(read_json(path), str(path))
    if fields.raw("_class_name") != _CLASS:
        raise CheckpointError(f"{path}: is the configuration of {fields.raw('_class_name')!r}, not of {_CLASS}")
    return fields


def _config(weights: Weights, saved: Fields | None, places: Sequence[int] | None) -> ControlConfig:
    shape = weights.get(f"{EMBEDDER}.weight").shape
    dim, patch = (shape[0], shape[1]) if len(shape) == 2 else (0, 0)
    channels = patch // PATCH_SIZE**2
    if channels not in (LATENT_CHANNELS, 2 * LATENT_CHANNELS + 1) or patch % PATCH_SIZE**2:
        raise CheckpointError(
            f"{weights.where}: {EMBEDDER}.weight has shape {list(shape)}: its latents have neither {LATENT_CHANNELS} "
            f"nor {2 * LATENT_CHANNELS + 1} channels; expected {_GOOD}"
        )
    norm = weights.get(f"{LAYERS_STEM}.0.attention.norm_q.weight").shape
    heads = dim // norm[0] if norm and norm[0] and dim % norm[0] == 0 else 0
    if not heads:
        raise CheckpointError(f"{weights.where}: a width of {dim} is no multiple of a head's {list(norm)} channels")
    layers, refiners = _count(weights, LAYERS_STEM), _count(weights, REFINER_STEM)
    refiner = _refiner(weights, channels, saved)
    return ControlConfig(
        version=_version(refiner, layers),
        dim=dim,
        n_heads=heads,
        channels=channels,
        latent_channels=LATENT_CHANNELS,
        places=_checked_places(weights.where, saved, layers, dim, places),
        refiner=refiner,
        n_refiner_layers=refiners or _REFINERS,
        norm_eps=1e-5 if saved is None else saved.number("norm_eps", 1e-5),
    )


def _count(weights: Weights, stem: str) -> int:
    """Blocks of a name. Raises `CheckpointError` where a number is missing."""
    pattern = re.compile(rf"{stem}\.(\d+)\.")
    numbers = {int(match[1]) for name in weights.names() if (match := pattern.match(name))}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(max(numbers))) - numbers)
        raise CheckpointError(f"{weights.where}: {stem}.{missing} not found; is the file complete?")
    return len(numbers)


def _refiner(weights: Weights, channels: int, saved: Fields | None) -> Refiner:
    """What refines the control tokens: as the configuration says, or as the tensors show."""
    if saved is not None:
        says = saved.raw("add_control_noise_refiner")
        known = {None: Refiner.PLAIN, "control_layers": Refiner.LAYERS, "control_noise_refiner": Refiner.CONTROL}
        if says not in known:
            raise CheckpointError(f"{saved.where}: add_control_noise_refiner {says!r} is unknown")
        return known[says]
    if channels == LATENT_CHANNELS:
        return Refiner.PLAIN
    projections = [f"{REFINER_STEM}.0.{name}.weight" for name in (BEFORE, AFTER)]
    trained = all(name in weights and not _is_zero(weights.get(name)) for name in projections)
    return Refiner.CONTROL if trained else Refiner.LAYERS


def _is_zero(source: TensorSource) -> bool:
    return not any(np.any(piece) for piece in source.chunks())


def _version(refiner: Refiner, layers: int) -> str:
    if refiner is Refiner.CONTROL:
        return "2.1-lite" if layers < _LITE else "2.1"
    return "2.0" if refiner is Refiner.LAYERS else "1.0"


def _checked_places(
    where: Path, saved: Fields | None, layers: int, dim: int, given: Sequence[int] | None
) -> tuple[int, ...]:
    """The model's layers that hints are added after: one for each control layer, the first of all among them."""
    if given is not None:
        found: Any = list(given)
    elif saved is not None:
        found = saved.raw("control_layers_places")
    elif dim == _WIDTH and layers in _PLACES:
        found = list(_PLACES[layers])
    else:
        raise CheckpointError(
            f"{where}: has {layers} control layers of width {dim}, which no published version has; say with --places "
            "after which layers of the model their hints are added, such as --places 0,2,4"
        )
    valid = isinstance(found, list) and all(type(place) is int and place >= 0 for place in found)
    if not valid or found != sorted(set(found)) or len(found) != layers or found[0] != 0:
        raise CheckpointError(
            f"{where}: has {layers} control layers, and their places are {found}; give as many, in order, from 0 on"
        )
    return tuple(found)
