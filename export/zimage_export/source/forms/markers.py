"""What a safetensors file says about how its layers are quantized.

ComfyUI's files say it for each layer: `X.comfy_quant` is JSON as bytes, or the file's metadata lists the layers, which
wins. Its older files have one marker, `scaled_fp8`, for all tensors of a prefix, whose type is the weights' type.

Sources: ComfyUI's ``comfy/utils.py``, ``convert_old_quants``; ``comfy/ops.py``, ``_load_quantized_module``;
``QUANTIZATION.md``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..tensors import PlainTensor, read_elements
from .scaled import E4M3, E5M2

METADATA_KEY = "_quantization_metadata"
LAYER_MARKER = ".comfy_quant"

_FILE_MARKER = "scaled_fp8"
_MOST_BYTES = 1 << 16
_FILE_TYPES = {E4M3: E4M3, E5M2: E5M2, "F32": E4M3}


@dataclass(frozen=True)
class LayerFormat:
    """What a marker promises for a layer's weight."""

    format: str
    options: Mapping[str, Any]


def layer_formats(found: Mapping[str, PlainTensor], metadata: Mapping[str, str], where: Path) -> dict[str, LayerFormat]:
    """By the layer's name, without `.weight`. Raises `CheckpointError` for a marker that cannot be understood."""
    formats: dict[str, LayerFormat] = {}
    for name, tensor in found.items():
        if name.endswith(LAYER_MARKER):
            layer = name.removesuffix(LAYER_MARKER)
            formats[layer] = _format(_layer_json(tensor), f"{tensor.path}: {name}")
    for layer, said in _listed(metadata, where).items():
        formats[_full_name(layer, found, where)] = _format(said, f"{where}: {METADATA_KEY}: {layer}")
    for layer in formats:
        if f"{layer}.weight" not in found:
            raise CheckpointError(f"{where}: {layer} is marked as quantized, but {layer}.weight is not in the file")
    return formats


def fp8_prefixes(found: Mapping[str, PlainTensor]) -> dict[str, str]:
    """The prefixes whose fp8 weights all have scales, each with the weights' type, from the older marker."""
    prefixes = {}
    for name, tensor in found.items():
        if name == _FILE_MARKER or name.endswith(f".{_FILE_MARKER}"):
            codes = _FILE_TYPES.get(tensor.stored_as)
            if codes is None:
                raise CheckpointError(
                    f"{tensor.path}: {name} is {tensor.stored_as}; it must be one of F8_E4M3, F8_E5M2"
                )
            prefixes[name.removesuffix(_FILE_MARKER)] = codes
    return prefixes


def is_file_marker(name: str) -> bool:
    """Whether a tensor is the older marker."""
    return name.rpartition(".")[2] == _FILE_MARKER


def _layer_json(tensor: PlainTensor) -> object:
    nbytes = tensor.entry.nbytes
    if tensor.stored_as not in ("U8", "I8") or nbytes > _MOST_BYTES:
        raise CheckpointError(f"{tensor.path}: {tensor.name} must be JSON as bytes, and is {tensor.stored_as}")
    data = read_elements(tensor.path, tensor.entry, np.dtype(np.uint8), 0, nbytes).tobytes()
    return _parsed(data, f"{tensor.path}: {tensor.name}")


def _parsed(text: str | bytes, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{where}: is not JSON; download or copy the file again") from None


def _listed(metadata: Mapping[str, str], where: Path) -> dict[str, object]:
    if METADATA_KEY not in metadata:
        return {}
    said = _parsed(metadata[METADATA_KEY], f"{where}: {METADATA_KEY}")
    layers = said.get("layers") if isinstance(said, dict) else None
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}: {METADATA_KEY} in the metadata lists no layers")
    return layers


def _full_name(layer: str, found: Mapping[str, PlainTensor], where: Path) -> str:
    """The layer's name with the prefix that the file's tensors have, which some makers leave out of the metadata."""
    if f"{layer}.weight" in found:
        return layer
    endings = [name.removesuffix(".weight") for name in found if name.endswith(f".{layer}.weight")]
    if len(endings) > 1:
        raise CheckpointError(f"{where}: {METADATA_KEY} names {layer}, which may be {' or '.join(sorted(endings)[:2])}")
    return endings[0] if endings else layer


def _format(said: object, where: str) -> LayerFormat:
    if isinstance(said, str):
        return LayerFormat(said, {})
    if not isinstance(said, dict) or not isinstance(said.get("format"), str):
        raise CheckpointError(f"{where}: names no format")
    inner = said.get("params")
    return LayerFormat(said["format"], {**(inner if isinstance(inner, dict) else {}), **said})
