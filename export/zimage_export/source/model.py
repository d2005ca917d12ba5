"""What MODEL and the options for components mean: where the files are, fetched from the Hub where they are named so.

MODEL is a directory in diffusers layout, a name on the Hub, one file that contains every component, a ComfyUI `models`
folder, or ``tiny``. A component's file may be on the Hub too: ``ORG/NAME/FILE``.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_runtime.bundle.hub import Hub, hub_id
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.programs import COMPONENTS

from ..errors import CheckpointError, ExportError
from .comfy_folder import find_in_models_folder, models_folder
from .contents import INDEX_SUFFIX, SUFFIXES, read_contents
from .foreign import refuse_adapters
from .kinds import KINDS, parts_in
from .single_files import NO_FILES, SingleFiles

_HUB_FILE = re.compile(r"(?P<name>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)/(?P<file>.+)")


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint on this machine."""

    path: str | Path  # for `Checkpoint.open`, which also knows the demo model's name
    name: str | None = None  # ORG/NAME of a model that came from the Hub
    revision: str | None = None  # the commit that was fetched
    files: SingleFiles = NO_FILES  # those given and those found, all on this machine


def find_model(
    model: str | Path, progress: Progress, revision: str | None = None, files: SingleFiles = NO_FILES
) -> FoundModel:
    """Finds a model's files. Fetches what is named by its place on the Hub, without what `files` replace.

    A path that is none of the forms is returned as it is, whether it exists or not: `Checkpoint.open` reports what is
    missing. Raises `HubError` for what cannot be fetched, `CheckpointError` for a file that lacks components, and
    `ExportError` for a path with a `revision`.
    """
    hub = Hub(progress=progress)
    files = _fetched(files, hub)
    name = hub_id(model)
    if name is not None:
        own_files = [part for part in COMPONENTS if files.get(part)]
        snapshot = hub.checkpoint(name, revision, without=own_files)
        return FoundModel(snapshot.path, name, snapshot.revision, files)
    if revision is not None and Path(model).exists():
        raise ExportError(f"{model}: a path has no --revision; that is for a name on the Hub")
    path = hub_file(model, hub, revision) or Path(model)
    if (path.is_file() and path.suffix != ".json") or path.name.endswith(INDEX_SUFFIX):
        return FoundModel(path, files=_all_in_one(path, files))
    if (folder := models_folder(path)) is not None:
        return FoundModel(path, files=find_in_models_folder(folder, files))
    return FoundModel(model, files=files)


def hub_file(given: str | Path, hub: Hub, revision: str | None = None) -> Path | None:
    """Fetches a file that is named ORG/NAME/FILE; None for anything else. Of a set of shards, fetches all."""
    path = Path(given)
    match = _HUB_FILE.fullmatch(path.as_posix())
    if match is None or path.exists() or path.suffix.lower() not in SUFFIXES:
        return None
    if Path(match["name"].partition("/")[0]).is_dir():
        return None  # a path with a wrong end
    return hub.file(match["name"], match["file"], revision)


def _fetched(files: SingleFiles, hub: Hub) -> SingleFiles:
    given = {part: path for part in COMPONENTS if (path := files.get(part))}
    fetched = {part: found for part, path in given.items() if (found := hub_file(path, hub))}
    return dataclasses.replace(files, **fetched)


def _all_in_one(path: Path, files: SingleFiles) -> SingleFiles:
    """The components of one file, but for those that have a file of their own."""
    contents = read_contents(path, "a safetensors or GGUF file, or a checkpoint in diffusers layout")
    refuse_adapters(contents.tensors, path, KINDS["transformer"].title)
    found = parts_in(contents.tensors)
    lacking = [part for part in COMPONENTS if files.get(part) is None and part not in found]
    if not found:
        raise CheckpointError(f"{path}: contains no component of a Z-Image model")
    if lacking:
        raise CheckpointError(
            f"{path}: contains {_list([KINDS[part].title for part in found])}, but no "
            f"{' and no '.join(KINDS[part].title for part in lacking)}: give "
            f"{_list(['--' + part.replace('_', '-') for part in lacking])}"
        )
    own = {part: path for part in found if files.get(part) is None}
    return dataclasses.replace(files, **own)


def _list(words: Sequence[str]) -> str:
    return " and ".join(words)
