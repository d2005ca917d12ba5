"""A checkpoint in diffusers layout, opened lazily: configurations at once, tensors on demand.

Components may come from single files instead (see `single_files`).
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.bundle.tensors import DType, TensorEntry, TensorFileError, read_header, to_float32
from zimage_runtime.errors import ConfigError
from zimage_runtime.mistaken_files import mistaken_for
from zimage_runtime.model.config import PARTS, ModelConfig
from zimage_runtime.model.programs import COMPONENTS

from ..errors import CheckpointError
from .single_files import NO_FILES, SingleFiles, check_depth, infer_config, read_single_file

FLOATING = (DType.F32, DType.F16, DType.BF16)
"""The element types that a checkpoint's weights may have."""

DEMO = Path(__file__).parents[3] / "demo_model" / "tiny"
"""The checkpoint of the demo model: in the repository, beside the packages, and not in an installed one."""

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

    def rows(self, first: int, count: int) -> NDArray[np.float32]:
        """`count` rows from `first` in float32, [count, …]. A vector is one row."""
        if len(self.shape) < 2:
            return self.read()[None]
        nbytes = self.entry.nbytes // max(self.shape[0], 1)
        entry = dataclasses.replace(
            self.entry,
            shape=(count, *self.shape[1:]),
            offset=self.entry.offset + first * nbytes,
            nbytes=nbytes * count,
        )
        return dataclasses.replace(self, entry=entry).read()

    def read_rows(self, count: int) -> NDArray[np.float32]:
        """The first `count` rows in float32; fewer where the tensor has fewer."""
        return self.rows(0, min(count, self.shape[0]))

    def picked_rows(self, chosen: Iterable[int]) -> NDArray[np.float32]:
        """Single rows in float32, in the order of their numbers given."""
        return np.concatenate([self.rows(int(row), 1) for row in chosen])

    def read(self) -> NDArray[np.float32]:
        """The whole tensor in float32."""
        flat = np.concatenate([to_float32(piece, self.dtype) for piece in self.chunks()] or [np.empty(0, np.float32)])
        return flat.reshape(self.shape)


class Weights:
    """The tensors of one component by name, from all of its shards."""

    def __init__(self, where: Path, tensors: Mapping[str, TensorSource]) -> None:
        """`where` is the folder or file that they come from."""
        self.where = where
        self._tensors = dict(tensors)

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        """Reads the headers only. Raises `CheckpointError` for a missing, truncated or malformed shard."""
        # a variant's index (model.fp16.safetensors.index.json) has one dot more
        indexes = sorted(p for p in folder.glob("*.safetensors.index.json") if p.name.count(".") == 3)
        index = next(iter(indexes), None)
        return cls(folder, _read_sharded(index) if index else _read_single(folder))

    @classmethod
    def in_file(cls, part: str, path: Path) -> Self:
        """A component from a file of its own. Raises `CheckpointError` for a file that cannot be used."""
        entries = read_single_file(part, path)
        return cls(path, {name: TensorSource(name, path, entry) for name, entry in entries.items()})

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def entries(self) -> dict[str, TensorEntry]:
        """Where each tensor lies, and its type and shape."""
        return {name: tensor.entry for name, tensor in self._tensors.items()}

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> TensorSource:
        """A tensor, of the given shape if one is given.

        Raises `CheckpointError` if it is missing, has another shape, or is not stored as floating point.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.where}: tensor {name} not found; is the checkpoint complete?")
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

    def with_tensors(self, tensors: Mapping[str, TensorSource]) -> "Weights":
        """The same component, with some of its tensors replaced."""
        return Weights(self.where, {**self._tensors, **tensors})

    def without_prefix(self, prefix: str) -> Self:
        """Accepts names with or without a prefix, which is removed."""
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
        isinstance(shard, str) and shard and shard == Path(shard).name for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: malformed: weight_map must map tensor names to file names")
    tensors = {}
    headers = {shard: _header(index.with_name(shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        entry = headers[shard].get(name)
        if entry is None:
            raise CheckpointError(f"{index.with_name(shard)}: tensor {name} not found, although {index.name} lists it")
        tensors[name] = TensorSource(name, index.with_name(shard), entry)
    return tensors


def _header(path: Path) -> dict[str, TensorEntry]:
    try:
        return read_header(path)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing from the checkpoint; download or copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        problem = mistaken_for(content) or "not valid JSON; download or copy it again"
        raise CheckpointError(f"{path}: {problem}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def demo_checkpoint() -> Path:
    """The demo model's checkpoint: of the repository that this code is part of, or that the process was started in.

    Raises `CheckpointError` elsewhere.
    """
    found = next((place for place in (DEMO, Path(*DEMO.parts[-2:])) if place.is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{DEMO.name}: the demo model's checkpoint is in the repository of zimage-rt, not in the installed "
            f"package; clone the repository and run this there, or give the path of its {'/'.join(DEMO.parts[-2:])}"
        )
    return found


@dataclass(frozen=True)
class Checkpoint:
    """A published model: its configuration, its tensors by component, and its tokenizer."""

    root: Path
    name: str  # what to call it: the transformer's single file, or else the directory's name
    config: ModelConfig
    text_encoder: Weights
    transformer: Weights
    vae: Weights
    tokenizer: Path  # tokenizer.json

    @classmethod
    def open(cls, path: str | Path, files: SingleFiles = NO_FILES) -> Self:
        """Opens a directory in diffusers layout, with the components that have a file of their own in `files`.

        Such a component's folder may be missing; where it has a ``config.json``, that one counts. With a file for
        every component, `path` need only have the tokenizer: ``tokenizer.json``, or a directory with it.
        ``"tiny"`` is the demo model (``"./tiny"`` a directory of that name).
        Raises `CheckpointError` for anything that is missing or wrong.
        """
        root = demo_checkpoint() if path == DEMO.name else Path(path)
        if not files.complete:
            _check_layout(root, files)
        weights = {part: Weights.in_file(part, file) for part in COMPONENTS if (file := files.get(part))}
        config = _read_config(root, files, weights)
        tokenizer = _find_tokenizer(root, files)
        weights |= {part: Weights.in_folder(root / part) for part in COMPONENTS if part not in weights}
        return cls(
            root=root,
            name=files.transformer.stem if files.transformer else root.resolve().name,
            config=config,
            text_encoder=weights["text_encoder"].without_prefix("model."),
            transformer=weights["transformer"],
            vae=weights["vae"],
            tokenizer=tokenizer,
        )

    @property
    def vae_type(self) -> DType:
        """The element type that the VAE is published in."""
        return self.vae.get("decoder.conv_in.weight").dtype

    @property
    def timestep_type(self) -> DType:
        """The element type that the timestep embedder is published in."""
        return self.transformer.get("t_embedder.mlp.0.weight").dtype

    def weights(self, component: str) -> Weights:
        """The tensors of `text_encoder`, `transformer` or `vae`."""
        return {"text_encoder": self.text_encoder, "transformer": self.transformer, "vae": self.vae}[component]


def _check_layout(root: Path, files: SingleFiles) -> None:
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory; give a checkpoint in diffusers layout")
    index = root / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{root}: not a checkpoint in diffusers layout (it has no model_index.json)")
    data = _read_json(index)
    kind = data.get("_class_name")
    if kind not in _PIPELINES:
        raise CheckpointError(f"{index}: {kind!r} is not supported; a Z-Image checkpoint says {_PIPELINES[0]!r}")
    for part, classes in _CLASSES.items():
        declared = data.get(part)
        name = declared[1] if isinstance(declared, list) and len(declared) == 2 else declared
        if name not in classes and not files.get(part):
            raise CheckpointError(f"{index}: {part} {name!r} is not supported; expected {' or '.join(classes)}")


def _read_config(root: Path, files: SingleFiles, weights: Mapping[str, Weights]) -> ModelConfig:
    """`weights` are those of single files."""
    parts: dict[str, object] = {}
    where: dict[str, str] = {}
    for part in PARTS:
        path = root / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        where[part] = str(path)
        if part in weights and not path.is_file():
            where[part] = str(weights[part].where)
            parts[part] = infer_config(part, weights[part].entries(), weights[part].where)
        elif part == "scheduler" and files.complete and not path.is_file():
            parts[part] = {}  # the published values
        else:
            parts[part] = _read_json(path)
    try:
        config = ModelConfig.read(parts, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    for part, single in weights.items():
        check_depth(part, single.entries(), single.where, config)
    return config


def _find_tokenizer(root: Path, files: SingleFiles) -> Path:
    tokenizer = root / "tokenizer" / "tokenizer.json"
    places = [tokenizer, root / tokenizer.name, root] if files.complete else [tokenizer]
    found = next((place for place in places if place.is_file()), None)
    if found:
        return found
    if files.complete:
        raise CheckpointError(
            f"{root}: tokenizer.json not found, and single files do not contain it; give its path or its directory"
        )
    raise CheckpointError(f"{tokenizer}: missing from the checkpoint; download or copy it again")
