"""A ComfyUI `models` folder as a model: the files in it that make a Z-Image pipeline, one for each component."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from zimage_runtime.bundle.hub import CHECKPOINT_INDEX
from zimage_runtime.model.programs import COMPONENTS

from ..errors import CheckpointError
from .contents import SUFFIXES, shards_of
from .kinds import KINDS
from .shapes import text_width
from .single_files import SingleFiles, read_single_file
from .tensors import FileTensor

FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
}
"""Where ComfyUI looks for each component, its older names last."""


def models_folder(path: Path) -> Path | None:
    """The folder that is laid out like ComfyUI's `models`: this one, or the one of that name in it."""
    for folder in (path, path / "models"):
        names = [name for part in ("transformer", "text_encoder") for name in FOLDERS[part]]
        if not (folder / CHECKPOINT_INDEX).exists() and any((folder / name).is_dir() for name in names):
            return folder
    return None


def find_in_models_folder(folder: Path, files: SingleFiles) -> SingleFiles:
    """The files of the components that `files` lacks.

    Raises `CheckpointError` where none fits, and where several do, which it lists.
    """
    for part in ("transformer", *(part for part in COMPONENTS if part != "transformer")):
        if files.get(part) is None:
            files = dataclasses.replace(files, **{part: _only(part, folder, files)})
    return files


def _only(part: str, folder: Path, files: SingleFiles) -> Path:
    option, names = f"--{part.replace('_', '-')}", FOLDERS[part]
    fitting, refused = [], []
    for path in _candidates(folder, names):
        try:
            found = read_single_file(part, path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        if part == "text_encoder" and not _fits(found.tensors, files):
            refused.append(f"{path}: is another size of text encoder")
            continue
        fitting.append(path)
    if len(fitting) == 1:
        return fitting[0]
    where = f"{folder}: {' and '.join(names)}"
    if fitting:
        listed = ", ".join(str(path.relative_to(folder)) for path in fitting)
        raise CheckpointError(f"{where} have {len(fitting)} files that fit: {listed}; choose one with {option}")
    reason = f" (the first of {len(refused)} others: {refused[0]})" if refused else ""
    raise CheckpointError(f"{where} have no {KINDS[part].title} ({KINDS[part].good}); give {option}{reason}")


def _fits(tensors: Mapping[str, FileTensor], files: SingleFiles) -> bool:
    """Whether the transformer reads a text encoder's hidden states."""
    assert files.transformer is not None
    reads = read_single_file("transformer", files.transformer).tensors.get("cap_embedder.0.weight")
    return reads is None or text_width({name: t.shape for name, t in tensors.items()}) == reads.shape[0]


def _candidates(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Files of the folders, a set of shards once."""
    seen: set[Path] = set()
    for path in (path for name in names for path in sorted((folder / name).rglob("*"))):
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or path in seen:
            continue
        with contextlib.suppress(CheckpointError):  # a shard is missing: reported when it is read
            seen.update(shards_of(path))
        yield path
