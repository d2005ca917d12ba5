"""The tensors of one component, from a folder of the checkpoint or from a file of their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from ..errors import CheckpointError
from .contents import read_safetensors, read_weight_map
from .gguf_file import Value
from .single_files import read_single_file
from .tensors import FLOATING, TensorSource


class Weights:
    """The tensors of one component by name, from all of its shards."""

    def __init__(
        self, where: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, Value] | None = None
    ) -> None:
        """`where` is the folder or file that they come from; `metadata` is what the file says about itself."""
        self.where = where
        self.metadata = metadata or {}
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
        found = read_single_file(part, path)
        return cls(path, found.tensors, found.metadata)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> TensorSource:
        """A tensor, of the given shape if one is given.

        Raises `CheckpointError` if it is missing, has another shape, or is stored in a form that is not supported.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.where}: tensor {name} not found; is the checkpoint complete?")
        if not tensor.readable:
            raise CheckpointError(
                f"{tensor.path}: {name} is stored as {tensor.stored_as}, without a scale or a form that is supported; "
                f"use the checkpoint in {', '.join(FLOATING)}"
            )
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, the configuration says {list(shape)}"
            )
        return tensor

    def with_tensors(self, tensors: Mapping[str, TensorSource]) -> "Weights":
        """The same component, with some of its tensors replaced."""
        return Weights(self.where, {**self._tensors, **tensors}, self.metadata)

    def without_prefix(self, prefix: str) -> Self:
        """Accepts names with or without a prefix, which is removed."""
        short = ((tensor, tensor.name.removeprefix(prefix)) for tensor in self._tensors.values())
        self._tensors = {name: tensor.renamed(name) for tensor, name in short}
        return self


def _read_single(folder: Path) -> dict[str, TensorSource]:
    paths = sorted(p for p in folder.glob("*.safetensors") if p.name.count(".") == 1)  # no .fp16. variants
    if len(paths) != 1:
        found = f"{len(paths)} safetensors files and no index" if paths else "no safetensors file"
        raise CheckpointError(f"{folder}: {found}; is the checkpoint complete?")
    return dict(read_safetensors(folder, paths).tensors)


def _read_sharded(index: Path) -> dict[str, TensorSource]:
    weight_map = read_weight_map(index)
    contents = read_safetensors(index.parent, map(index.with_name, sorted(set(weight_map.values()))))
    for name, shard in weight_map.items():
        if contents.places.get(name) != index.with_name(shard):
            raise CheckpointError(f"{index.with_name(shard)}: tensor {name} not found, although {index.name} lists it")
    return {name: tensor for name, tensor in contents.tensors.items() if name in weight_map}
