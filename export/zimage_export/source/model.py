"""What MODEL means wherever a command asks for a checkpoint: a directory, a name on the Hub, or ``tiny``."""

from dataclasses import dataclass
from pathlib import Path

from zimage_runtime.bundle.hub import Hub, hub_id
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.programs import COMPONENTS

from ..errors import ExportError
from .single_files import NO_FILES, SingleFiles


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint on this machine."""

    path: str | Path  # for `Checkpoint.open`, which also knows the demo model's name
    name: str | None = None  # ORG/NAME of a model that came from the Hub
    revision: str | None = None  # the commit that was fetched


def find_model(
    model: str | Path, progress: Progress, revision: str | None = None, files: SingleFiles = NO_FILES
) -> FoundModel:
    """Fetches a model that is given by its name on the Hub, without the components that `files` replace.

    Anything else is returned as it is, whether it exists or not: `Checkpoint.open` reports what is missing. Raises
    `HubError` for a model that cannot be fetched, and `ExportError` for a directory with a `revision`.
    """
    name = hub_id(model)
    if name is None:
        if revision is not None and Path(model).exists():
            raise ExportError(f"{model}: a directory has no --revision; that is for a name on the Hub")
        return FoundModel(model)
    own_files = [part for part in COMPONENTS if files.get(part)]
    snapshot = Hub(progress=progress).checkpoint(name, revision, without=own_files)
    return FoundModel(snapshot.path, name, snapshot.revision)
