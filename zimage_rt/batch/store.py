"""Where a batch's files are: a folder, or a URL that fsspec knows. A file is there as a whole or not at all.

Beside the images, the hidden folder `.zimage-batch` holds what is not finished: latents that wait for decoding, a
record of each image until the manifest has it, and what a worker on Ray has begun.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from zimage_runtime.bundle.files import atomic_write, hash_file, temporary_sibling
from zimage_runtime.errors import RequestError

WORK = ".zimage-batch"
RECORDS = f"{WORK}/records"
LATENTS = f"{WORK}/latents"
ATTEMPTS = f"{WORK}/attempts"

_FOLDERS = ("", RECORDS, LATENTS, ATTEMPTS)
_LEFT = re.compile(r"\..+\.[0-9a-f]{8}\.part")  # as `temporary_sibling` names what is being written

_WHOLE = {"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"}
"""Protocols of stores where an object appears when it is complete."""


class Store(Protocol):
    """Files by their names, which are relative and have slashes. Every method may raise `OSError`."""

    @property
    def where(self) -> str:
        """For people, and for `open_store` in another process."""

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None where it does not exist."""

    def write(self, name: str, data: bytes, *, durable: bool = False) -> None:
        """Writes or replaces a file. Kept even if the machine loses power right after, if `durable`."""

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""

    def names(self, folder: str) -> list[str]:
        """The names of all that is in a folder, "" for the whole, but for what is hidden or being written."""

    def holds(self, name: str, size: int, sha256: str) -> bool:
        """Whether a file is the one that was written: by its hash or, where reading it is a transfer, its size."""

    def location(self, name: str) -> str:
        """A file's path or URL."""

    def tidy(self) -> None:
        """Removes what was left by writers that were killed. Only where nobody writes."""


def open_store(where: str) -> Store:
    """The store of a folder or URL; a folder is made where it is missing.

    Raises `RequestError` for a place that cannot serve.
    """
    if "://" in where:
        return _open_url(where)
    root = Path(where)
    try:
        for folder in _FOLDERS[1:]:
            (root / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{root}: the folder cannot be used: {error.strerror or error}") from None
    return FolderStore(root)


@dataclass(frozen=True)
class FolderStore:
    """A folder. Implements `Store`."""

    root: Path

    @property
    def where(self) -> str:
        return str(self.root.absolute())

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, durable: bool = False) -> None:
        path = self.root / name
        try:
            with atomic_write(path, durable=durable) as file:
                file.write(data)
        except OSError as error:  # which names the temporary file, or none
            raise OSError(error.errno, error.strerror, str(path)) from None

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(path.name for path in (self.root / folder).iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []

    def holds(self, name: str, size: int, sha256: str) -> bool:
        path = self.root / name
        try:
            return path.stat().st_size == size and hash_file(path) == sha256
        except FileNotFoundError:
            return False

    def location(self, name: str) -> str:
        return str(self.root / name)

    def tidy(self) -> None:
        for folder in _FOLDERS:
            for path in (self.root / folder).glob(".*.part"):
                if _LEFT.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other batches out of the folder for as long as the block runs, or the process lives.

        Raises `RequestError` where another one is at work.
        """
        path = self.root / WORK / "lock"
        with path.open("ab") as file:
            try:
                _lock(file.fileno())
            except OSError:
                raise RequestError(f"{self.root}: another batch writes into this folder") from None
            yield


if sys.platform == "win32":

    def _lock(descriptor: int) -> None:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:

    def _lock(descriptor: int) -> None:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _open_url(url: str) -> "UrlStore":
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RequestError(f"{url}: cannot be used: {error}") from None
    protocol = url.partition("://")[0]
    store = UrlStore(url.rstrip("/"), system, root.rstrip("/"), whole=protocol in _WHOLE)
    try:
        for folder in _FOLDERS[1:]:
            system.makedirs(f"{store.root}/{folder}", exist_ok=True)
    except OSError as error:
        raise RequestError(f"{url}: cannot be used: {error.strerror or error}") from None
    return store


@dataclass(frozen=True)
class UrlStore:
    """A place that fsspec knows. Implements `Store`."""

    url: str
    system: Any
    root: str
    whole: bool  # an object appears only when it is complete

    @property
    def where(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        try:
            data: bytes = self.system.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, data: bytes, *, durable: bool = False) -> None:
        path = self._path(name)
        if self.whole:
            self.system.pipe_file(path, data)
            return
        folder, _, last = path.rpartition("/")
        beside = f"{folder}/{temporary_sibling(Path(last)).name}"
        try:
            self.system.pipe_file(beside, data)
            self.system.mv(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.system.rm_file(beside)
            raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._path(name))

    def names(self, folder: str) -> list[str]:
        try:
            self.system.invalidate_cache()
            found = (str(path).rpartition("/")[2] for path in self.system.ls(self._path(folder), detail=False))
            return sorted(name for name in found if not name.startswith("."))
        except FileNotFoundError:
            return []

    def holds(self, name: str, size: int, sha256: str) -> bool:
        try:
            return bool(self.system.info(self._path(name))["size"] == size)
        except FileNotFoundError:
            return False

    def location(self, name: str) -> str:
        return f"{self.url}/{name}"

    def tidy(self) -> None:
        if self.whole:
            return
        for folder in _FOLDERS:
            for path in self.system.ls(self._path(folder).rstrip("/"), detail=False):
                if _LEFT.fullmatch(str(path).rpartition("/")[2]):
                    self.system.rm_file(path)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"
