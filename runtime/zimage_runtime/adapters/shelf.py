"""The LoRA of a pipeline: files that were read, and the matrices of those that the last request used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.hub import adapter_file
from ..errors import AdapterError
from .branches import Branches, check_at_run_time, make_branches
from .given import GivenLora
from .reader import Adapter, WeightedAdapter, read_adapter

_MOST = 16
"""Files that stay open."""

_Key = tuple[str, int, int, bool]
_Used = tuple[tuple[str, float], ...]


@dataclass
class LoraShelf:
    """Reads a file again only when it has changed, and makes matrices only for another choice of files or weights."""

    bundle: Bundle
    _read: dict[_Key, Adapter] = field(default_factory=dict)
    _made: tuple[_Used, Branches] | None = None

    def open(self, given: Sequence[GivenLora], *, allow_unused: bool = False) -> tuple[WeightedAdapter, ...]:
        """Reads and checks files that can be used at run time, fetched if they are on the Hub.

        Raises `AdapterError` or `HubError`.
        """
        found = tuple(WeightedAdapter(self._adapter(adapter_file(one.file), allow_unused), one.weight) for one in given)
        check_at_run_time(found, self.bundle.manifest.source.name)
        return found

    def _adapter(self, path: Path, allow_unused: bool) -> Adapter:
        try:
            state = path.stat()
        except (OSError, ValueError):
            raise AdapterError(f"{path}: no such file") from None
        key = (str(path.absolute()), state.st_mtime_ns, state.st_size, allow_unused)
        if key not in self._read:
            adapter = read_adapter(path, self.bundle.manifest.config, allow_unused=allow_unused)
            self._read = dict([*self._read.items(), (key, adapter)][-_MOST:])
        return self._read[key]

    def branches(self, loras: Sequence[WeightedAdapter]) -> Branches:
        """The matrices of files; those of the last call are kept. Raises `BundleError` (see `make_branches`)."""
        used = tuple((one.adapter.hash, one.weight) for one in loras)
        if self._made is None or self._made[0] != used:
            self._made = None  # before the new ones are made
            self._made = used, make_branches(self.bundle, loras)
        return self._made[1]

    def forget(self) -> None:
        """Frees the matrices."""
        self._made = None
