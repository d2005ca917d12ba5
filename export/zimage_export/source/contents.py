"""What a file, or a set of shards, contains: its tensors by the file's own names, and its metadata.

What kind of file it is, is read from its first bytes. Of a set of shards, any one stands for all.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runtime.bundle.tensors import TensorFileError, read_header, read_metadata
from zimage_runtime.mistaken_files import HEAD_BYTES, mistaken_for

from ..errors import CheckpointError
from .forms.recognize import recognize
from .gguf_file import MAGIC, Value, read_gguf
from .tensors import FileTensor, PlainTensor

SUFFIXES = (".safetensors", ".sft", ".gguf")
"""Of files that are read."""

INDEX_SUFFIX = ".safetensors.index.json"

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_MOST_SHARDS = 1000


@dataclass(frozen=True)
class Contents:
    """The tensors of a file or of a set of shards."""

    where: Path  # as it was given
    tensors: Mapping[str, FileTensor]
    metadata: Mapping[str, Value]
    places: Mapping[str, Path]  # the file of everything that the headers list, scales and markers included


def read_contents(path: Path, instead: str = "the safetensors file") -> Contents:
    """Reads headers only. `instead` is what to give in place of a file of an unsupported kind.

    Raises `CheckpointError` for a file that is missing, damaged, of another kind or in a form that is not supported.
    """
    paths = shards_of(path)
    if all(_is_gguf(one, instead) for one in paths):
        parts = [read_gguf(one) for one in paths]
        tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
        return Contents(path, tensors, parts[0].values, {name: tensor.path for name, tensor in tensors.items()})
    return read_safetensors(path, paths)


def read_safetensors(where: Path, paths: Iterable[Path]) -> Contents:
    """The tensors of several files as those of one: a weight and its scales may lie in two of them."""
    found: dict[str, PlainTensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            entries, said = read_header(path), read_metadata(path)
        except TensorFileError as error:
            raise CheckpointError(str(error)) from None
        found |= {name: PlainTensor(name, path, entry) for name, entry in entries.items()}
        metadata |= said
    places = {name: tensor.path for name, tensor in found.items()}
    return Contents(where, recognize(found, metadata, where), metadata, places)


def shards_of(path: Path) -> tuple[Path, ...]:
    """The files of the set that a shard or an index belongs to; a file that is no shard alone.

    Raises `CheckpointError`, which names a shard that is missing.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return tuple(path.with_name(name) for name in sorted(set(read_weight_map(path).values())))
    match = _SHARD.fullmatch(path.name)
    if match is None or not 1 <= int(match["count"]) <= _MOST_SHARDS:
        return (path,)
    count = int(match["count"])
    shards = tuple(
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}{match['suffix']}")
        for number in range(1, count + 1)
    )
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing and path.exists():
        raise CheckpointError(
            f"{path}: is one of {count} shards, and {missing[0]} is missing beside it; download it into the same folder"
        )
    return shards if not missing else (path,)


def set_name(path: Path) -> str:
    """What to call a model after its file: without the suffix, and without the number of a shard."""
    name = path.name.removesuffix(INDEX_SUFFIX)
    match = _SHARD.fullmatch(name)
    return match["stem"] if match else name.removesuffix(path.suffix)


def read_weight_map(index: Path) -> dict[str, str]:
    """Which shard each tensor is in, by an index. Raises `CheckpointError`."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and shard and shard == Path(shard).name for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: malformed: weight_map must map tensor names to file names")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises `CheckpointError`."""
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


def _is_gguf(path: Path, instead: str) -> bool:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; give {instead}")
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(f"{path}: is a pickle, which can run any code when it is loaded; use {instead}")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not head.startswith(MAGIC) and path.suffix.lower() == ".gguf":
        problem = mistaken_for(head) or ("truncated: it is empty" if not head else "not a GGUF file")
        raise CheckpointError(f"{path}: {problem}; use {instead}")
    return head.startswith(MAGIC)
