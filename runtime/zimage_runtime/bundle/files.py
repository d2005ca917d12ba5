"""Writing files so that a reader sees a whole file or none."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 22


def temporary_sibling(path: Path) -> Path:
    """A fresh hidden name in the folder of `path`, so that a rename stays on one file system."""
    # cut: a name may be as long as the file system allows
    return path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def atomic_write(path: Path, *, overwrite: bool = True, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that appears at `path` only when the block ends without an error; otherwise nothing is left behind.

    A `durable` file is on the disk before it appears, which takes milliseconds and outlives a loss of power.
    Without `overwrite`, raises `FileExistsError` if the name was taken while the block ran.
    """
    temporary = temporary_sibling(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if overwrite or not _link(temporary, path):
            if not overwrite and path.exists():
                raise FileExistsError(str(path))
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    """Gives `source` the name `target` too, or fails if it is taken. False if the file system has no hard links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def hash_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """The SHA-256 of a file; `progress` gets the bytes of each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()
