"""A checkpoint in diffusers layout as ComfyUI's three single files, which stable-diffusion.cpp reads.

Bytes are copied as they are, tensor by tensor: only names change, three projections become the rows of one, and the
VAE's attention layers get the shape of convolutions over single pixels (see `model.comfyui_names`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zimage_runtime.bundle.files import atomic_write
from zimage_runtime.bundle.tensors import DType, TensorEntry, encode_header, read_header
from zimage_runtime.errors import ZImageRuntimeError
from zimage_runtime.model.comfyui_names import is_pixelwise, to_comfyui

FILES = {"transformer": "z_image.safetensors", "text_encoder": "qwen_3_4b.safetensors", "vae": "ae.safetensors"}
"""The file of each component."""

_PIECE = 16 << 20


class ConversionError(ZImageRuntimeError):
    """A checkpoint that cannot be written under other names."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    path: Path
    entry: TensorEntry


@dataclass(frozen=True)
class Joined:
    """A tensor of the new file: the bytes of one or three others, one after the other."""

    shape: tuple[int, ...]
    parts: tuple[Stored, ...]


def convert(checkpoint: Path, out: Path) -> Path:
    """Writes the files that are not in `out` yet, and returns `out`. Raises `ConversionError` or `TensorFileError`."""
    out.mkdir(parents=True, exist_ok=True)
    for component, file in FILES.items():
        path = out / file
        if not path.exists():
            _write(path, _joined(component, _tensors(checkpoint / component)))
    return out


def _tensors(folder: Path) -> dict[str, Stored]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ConversionError(f"{folder}: contains no safetensors files; give a checkpoint in diffusers layout")
    return {name: Stored(shard, entry) for shard in shards for name, entry in read_header(shard).items()}


def _write(path: Path, tensors: Mapping[str, Joined]) -> None:
    header = {name: (_dtype(name, tensor), tensor.shape) for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(encode_header(header))
        for tensor in tensors.values():
            for piece in _pieces(tensor.parts):
                file.write(piece)


def _dtype(name: str, tensor: Joined) -> DType:
    types = {part.entry.dtype for part in tensor.parts}
    if len(types) != 1 or not types <= set(DType.__members__):
        raise ConversionError(f"{name}: cannot be written as {' and '.join(sorted(types))}")
    return DType(types.pop())


def _pieces(parts: Iterable[Stored]) -> Iterator[bytes]:
    for part in parts:
        with part.path.open("rb") as file:
            file.seek(part.entry.offset)
            left = part.entry.nbytes
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise ConversionError(f"{part.path}: became shorter while it was read")
                left -= len(piece)
                yield piece


def _joined(component: str, stored: Mapping[str, Stored]) -> dict[str, Joined]:
    """The tensors of a component's file, under ComfyUI's names."""
    found = {}
    for name, parts in to_comfyui(component, stored).items():
        tensors = tuple(_need(stored, part) for part in parts)
        rows, *rest = tensors[0].entry.shape
        pixelwise = is_pixelwise(component, parts[0]) and len(rest) == 1
        found[name] = Joined((rows * len(parts), *rest, *((1, 1) if pixelwise else ())), tensors)
    return found


def _need(stored: Mapping[str, Stored], name: str) -> Stored:
    if name not in stored:
        raise ConversionError(f"tensor {name} not found in the checkpoint; is it complete?")
    return stored[name]
