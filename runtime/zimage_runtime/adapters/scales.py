"""What an adapter's product is multiplied by: alpha over rank, where the file says so, and 1 otherwise.

PEFT keeps alpha outside of the tensors: in the file's metadata (diffusers' ``lora_adapter_metadata``) or in an
``adapter_config.json`` beside it. Its patterns are matched as its own ``get_pattern_key`` does.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.tensors import DType, TensorFile, read_metadata, to_float32
from ..errors import AdapterError

_LARGEST = 1e4
"""Of a scale: alpha is rarely more than twice the rank."""

_OTHER_SCALARS = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_MOST_CONFIG = 1 << 20  # bytes


def scalar(file: TensorFile, name: str) -> float:
    """A tensor of one element, of any number type. Raises `AdapterError`."""
    entry = file.entries[name]
    if math.prod(entry.shape) != 1:
        raise AdapterError(f"{file.path}: {name} has shape {list(entry.shape)}, it must be one number")
    if entry.dtype in DType.__members__:
        values, dtype = file.array(name)
        return float(to_float32(values.reshape(-1), dtype)[0])
    if entry.dtype not in _OTHER_SCALARS:
        raise AdapterError(f"{file.path}: {name}: {entry.dtype} is not supported")
    with file.path.open("rb") as stream:
        stream.seek(entry.offset)
        return float(np.frombuffer(stream.read(entry.nbytes), _OTHER_SCALARS[entry.dtype])[0])


def checked_scale(value: float, alpha: float, where: str) -> float:
    """A scale that has an effect and is no accident. Raises `AdapterError`."""
    if alpha == 0:
        raise AdapterError(f"{where} is 0, with which the file has no effect (some programs read it as the rank)")
    if not math.isfinite(value) or abs(value) > _LARGEST:
        raise AdapterError(f"{where} is {alpha:g}, which no trainer writes; is the file damaged?")
    return value


@dataclass(frozen=True)
class PeftConfig:
    """PEFT's alpha, outside of the tensors."""

    alpha: float | None = None
    patterns: Mapping[str, float] | None = None
    rank_stabilized: bool = False  # rsLoRA: the scale is alpha over the root of the rank
    where: str = ""

    def scale(self, module: str, rank: int) -> float:
        """Of a module, under the name that the file gives it. Raises `AdapterError`."""
        alpha = self.alpha
        for pattern, value in (self.patterns or {}).items():
            if re.match(rf"(.*\.)?({re.escape(pattern)})$", module):
                alpha = value
                break
        if alpha is None:
            return 1.0
        divisor = math.sqrt(rank) if self.rank_stabilized else rank
        return checked_scale(alpha / divisor, alpha, f"{self.where}: lora_alpha")


def read_peft_config(path: Path) -> PeftConfig:
    """What a file, or PEFT's configuration beside it, says of alpha."""
    texts = read_metadata(path)
    if text := texts.get("lora_adapter_metadata"):
        plain = _json(text)
        # diffusers' names start with the component's: one file may hold several
        found = {key.removeprefix("transformer."): value for key, value in plain.items()}
        return _config(found, f"{path}: lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file() and beside.stat().st_size <= _MOST_CONFIG:
        return _config(_json(beside.read_text("utf-8", errors="replace")), str(beside))
    return PeftConfig()


def _config(plain: Mapping[str, Any], where: str) -> PeftConfig:
    patterns = plain.get("alpha_pattern")
    by_pattern = {str(key): _number(value) for key, value in patterns.items()} if isinstance(patterns, dict) else {}
    return PeftConfig(
        alpha=_number(plain.get("lora_alpha")),
        patterns={key: value for key, value in by_pattern.items() if value is not None},
        rank_stabilized=plain.get("use_rslora") is True,
        where=where,
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
