"""The folder that an export writes: checked beforehand, built under a temporary name, renamed when complete."""

import contextlib
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from zimage_runtime.bundle.manifest import CONTROL_FORMAT, FORMAT, MANIFEST_NAME

from .errors import ExportError

_SPARE = 64 << 20  # bytes for programs, tokenizer and the file system's own needs


def check_disk(target: Path, needed: int) -> None:
    """Raises `ExportError` where `needed` bytes do not fit beside `target`."""
    free = shutil.disk_usage(_existing_parent(target)).free
    if needed + _SPARE > free:
        raise ExportError(f"{target}: no space left: {(needed + _SPARE) / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def _existing_parent(target: Path) -> Path:
    parent = target.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return parent


def check_target(target: Path, force: bool) -> None:
    """Raises `ExportError` unless a bundle may be written at `target`.

    With `force` a bundle or an empty folder is replaced; anything else is never touched.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ExportError(f"{target}: already exists; use --force to replace it")
    if target.is_dir() and target.samefile(Path()):
        raise ExportError(f"{target}: is the current folder, which cannot be replaced; give a folder inside it")
    if not target.is_dir() or target.is_symlink() or (any(target.iterdir()) and not _is_bundle(target)):
        raise ExportError(f"{target}: exists and is not a bundle, so --force does not replace it; choose another path")


def _is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle or a ControlNet."""
    try:
        data = json.loads((path / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") in (FORMAT, CONTROL_FORMAT)


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A temporary folder that replaces `target` when the block ends normally, and is removed otherwise.

    Folders above `target` are created as needed, and removed with it. An `OSError` names `target` as it was given.
    """
    place = Path(os.path.abspath(target))  # "." has no name to append a suffix to
    suffix = f"{os.getpid()}-{secrets.token_hex(4)}"
    folder = place.with_name(f".{place.name}.{suffix}.part")
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(place)
        folder.mkdir()
        yield folder
        _swap(folder, place, place.with_name(f".{place.name}.{suffix}.old"))
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # there is something in it
                parent.rmdir()


def _swap(folder: Path, target: Path, aside: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    target.rename(aside)
    try:
        folder.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    """Removes what killed exports to the same target left behind.

    A bundle that was moved aside to be replaced is restored if nothing replaced it.
    """
    import psutil

    for path in target.parent.glob(f".{glob.escape(target.name)}.*-*.*"):
        owner = path.name.removeprefix(f".{target.name}.").partition("-")[0]
        if path.suffix not in (".part", ".old") or not owner.isdecimal() or psutil.pid_exists(int(owner)):
            continue
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
