"""A checkpoint in diffusers layout, opened lazily: configurations at once, tensors when they are asked for."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.config import ModelConfig
from zimage_runtime.errors import ConfigError
from zimage_runtime.tensors import DType, TensorEntry, TensorFileError, read_header, to_float32

from .errors import CheckpointError

FLOATING = (DType.F32, DType.F16, DType.BF16)
"""The element types that a checkpoint's weights may have."""

_CHUNK_BYTES = 64 << 20

_PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")

_CLASSES = {
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
}


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a checkpoint, on disk."""

    name: str
    path: Path
    entry: TensorEntry

    @property
    def dtype(self) -> DType:
        """The stored element type, which is a floating-point one."""
        return DType(self.entry.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.entry.shape

    def chunks(self, max_bytes: int = _CHUNK_BYTES) -> Iterator[NDArray[np.generic]]:
        """The stored elements, flat, in pieces of at most `max_bytes`; read, not mapped, so memory stays bounded."""
        count = max(max_bytes // self.dtype.size, 1)
        left = self.entry.nbytes // self.dtype.size
        try:
            with self.path.open("rb") as file:
                file.seek(self.entry.offset)
                while left:
                    piece = np.fromfile(file, dtype=self.dtype.storage, count=min(count, left))
                    if not len(piece):
                        raise CheckpointError(f"{self.path}: truncated while it was read; download or copy it again")
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None

    def read(self) -> NDArray[np.float32]:
        """The whole tensor in float32."""
        flat = np.concatenate([to_float32(piece, self.dtype) for piece in self.chunks()] or [np.empty(0, np.float32)])
        return flat.reshape(self.shape)


class Weights:
    """The tensors of one component by name, whichever shard they lie in."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers only. Raises `CheckpointError` for a missing, truncated or malformed shard."""
        self.folder = folder
        index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
        self._tensors = _read_sharded(index) if index else _read_single(folder)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> TensorSource:
        """A tensor, of the given shape if one is given.

        Raises `CheckpointError` if it is missing, has another shape, or is not stored as floating point.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.folder}: holds no tensor {name}; is this the whole checkpoint?")
        if tensor.entry.dtype not in FLOATING:
            raise CheckpointError(
                f"{tensor.path}: {name} is stored as {tensor.entry.dtype}, which is not supported; "
                f"use the checkpoint in {', '.join(FLOATING)}"
            )
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, the configuration says {list(shape)}"
            )
        return tensor

    def without_prefix(self, prefix: str) -> Self:
        """Accepts names with or without a prefix: it is taken off wherever it stands."""
        self._tensors = {
            short: dataclasses.replace(tensor, name=short)
            for short, tensor in ((t.name.removeprefix(prefix), t) for t in self._tensors.values())
        }
        return self


def _read_single(folder: Path) -> dict[str, TensorSource]:
    paths = sorted(p for p in folder.glob("*.safetensors") if p.name.count(".") == 1)  # no .fp16. variants
    if len(paths) != 1:
        found = f"{len(paths)} safetensors files and no index" if paths else "no safetensors file"
        raise CheckpointError(f"{folder}: {found}; is the checkpoint complete?")
    return {name: TensorSource(name, paths[0], entry) for name, entry in _header(paths[0]).items()}


def _read_sharded(index: Path) -> dict[str, TensorSource]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and shard == Path(shard).name for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: malformed: weight_map must map tensor names to file names")
    tensors = {}
    headers = {shard: _header(index.with_name(shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        entry = headers[shard].get(name)
        if entry is None:
            raise CheckpointError(f"{index.with_name(shard)}: holds no tensor {name}, which {index.name} says it does")
        tensors[name] = TensorSource(name, index.with_name(shard), entry)
    return tensors


def _header(path: Path) -> dict[str, TensorEntry]:
    try:
        return read_header(path)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing from the checkpoint; download or copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not valid JSON; download or copy it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


@dataclass(frozen=True)
class Checkpoint:
    """A published model: its configuration, its tensors by component, and its tokenizer."""

    root: Path
    name: str  # what to call it: the directory's name
    config: ModelConfig
    text_encoder: Weights
    transformer: Weights
    vae: Weights
    tokenizer: Path  # tokenizer.json

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a directory in diffusers layout. Raises `CheckpointError` for whatever is missing or wrong."""
        root = Path(path)
        if not root.is_dir():
            raise CheckpointError(f"{root}: no such directory; give a checkpoint in diffusers layout")
        if not (root / "model_index.json").is_file():
            raise CheckpointError(f"{root}: not a checkpoint in diffusers layout (it has no model_index.json)")
        _check_architecture(root / "model_index.json")
        config_paths = {
            part: root / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
            for part in ("text_encoder", "transformer", "vae", "scheduler")
        }
        parts = {part: _read_json(config_path) for part, config_path in config_paths.items()}
        try:
            config = ModelConfig.read(parts, {part: str(path) for part, path in config_paths.items()})
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        tokenizer = root / "tokenizer" / "tokenizer.json"
        if not tokenizer.is_file():
            raise CheckpointError(f"{tokenizer}: missing from the checkpoint; download or copy it again")
        return cls(
            root=root,
            name=root.resolve().name,
            config=config,
            text_encoder=Weights(root / "text_encoder").without_prefix("model."),
            transformer=Weights(root / "transformer"),
            vae=Weights(root / "vae"),
            tokenizer=tokenizer,
        )

    def weights(self, component: str) -> Weights:
        """The tensors of `text_encoder`, `transformer` or `vae`."""
        return {"text_encoder": self.text_encoder, "transformer": self.transformer, "vae": self.vae}[component]


def _check_architecture(index: Path) -> None:
    data = _read_json(index)
    kind = data.get("_class_name")
    if kind not in _PIPELINES:
        raise CheckpointError(f"{index}: {kind!r} is not supported; a Z-Image checkpoint says {_PIPELINES[0]!r}")
    for part, classes in _CLASSES.items():
        declared = data.get(part)
        name = declared[1] if isinstance(declared, list) and len(declared) == 2 else declared
        if name not in classes:
            raise CheckpointError(f"{index}: {part} {name!r} is not supported; expected {' or '.join(classes)}")
