"""Files of one commit on the Hub, into huggingface_hub's cache.

Where the server offers Xet, huggingface_hub downloads by itself. Otherwise weights are collected in a partial file of
our own beside its blobs, so that the next run continues where this one stopped: huggingface_hub does not continue a
file after the process that downloaded it has ended, and a partial file of its own may have been written in any order.
Every file whose hash is known is checked before it is used.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..command_line.progress import Progress
from .files import hash_file
from .hub_errors import HubError, explain, not_cached

PARTIAL = ".zimage-rt.incomplete"
"""What the names of our partial files end in; `hf cache prune` removes files that end in ``.incomplete``."""

WEIGHTS = (".safetensors", ".sft", ".gguf")
"""The endings of files of weights, which are large: their downloads are continued."""

_BLOB_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPARE = 64 << 20  # bytes for the small files and the file system's own needs

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file as it should arrive."""

    size: int = 0  # bytes; 0 where it is not known
    sha256: str | None = None


def cache_folder() -> Path:
    """Where huggingface_hub's cache is."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def timeout() -> float:
    """Seconds to wait for the Hub's answer to a question."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT)


def ask(name: str, revision: str | None, call: Callable[[], T]) -> T:
    """Calls huggingface_hub for a model. Raises `HubError`, which says in one line what went wrong."""
    try:
        return call()
    except Exception as error:  # the HTTP libraries below huggingface_hub share no base but Exception
        raise explain(error, name, revision, cache_folder()) from None


@dataclass(frozen=True)
class Download:
    """One commit of a model, and the download of its files."""

    progress: Progress
    name: str
    revision: str | None  # as the user gave it
    commit: str
    folder: Path  # in the cache
    files: Mapping[str, RemoteFile]  # all files of the commit; offline, those in the cache
    offline: str | None = None  # why the Hub is not asked

    def weights(self, component: str) -> list[str]:
        """The safetensors files of a component: those that its index names, or the only one; no variants."""
        inside = sorted(file for file in self.files if file.startswith(f"{component}/"))
        indices = [file for file in inside if file.endswith(".safetensors.index.json") and file.count(".") == 3]
        single = [file for file in inside if file.endswith(".safetensors") and file.count(".") == 1]
        if indices:
            return [f"{component}/{shard}" for shard in _shards(self.fetch(indices[0]))]
        if len(single) != 1 and self.offline:
            raise not_cached(self.name, self.offline, f"the file list of {component}")
        if len(single) != 1:
            raise HubError(
                f"{self.name}: {component} has {len(single)} safetensors files and no index; "
                "use a checkpoint whose weights are stored as safetensors"
            )
        return single

    def fetch_all(self, wanted: Mapping[str, RemoteFile]) -> None:
        """Downloads what the cache lacks. Raises `HubError` where the disk has no room for it."""
        missing = {file: remote for file, remote in wanted.items() if not (self.folder / file).exists()}
        if not missing:
            return
        if self.offline:
            raise not_cached(self.name, self.offline, next(iter(missing)))
        for file, remote in missing.items():
            self._check_offered(file, remote)
        total = sum(remote.size for remote in missing.values())
        partials = (self._blobs / f"{remote.sha256}{PARTIAL}" for remote in missing.values())
        here = sum(partial.stat().st_size for partial in partials if partial.exists())
        free = shutil.disk_usage(self.folder).free
        if total - here + _SPARE > free:
            raise HubError(
                f"{cache_folder()}: no space left: {self.name} needs {total / 1e9:.2f} GB more, "
                f"{free / 1e9:.2f} GB is free; set HF_HOME to a folder with more room"
            )
        self.progress.note(
            f"downloading {len(missing)} files, {total / 1e9:.2f} GB, of {self.name} at {self.commit[:12]}"
        )
        for file, remote in missing.items():
            self.fetch(file, remote.sha256)

    def _check_offered(self, file: str, wanted: RemoteFile) -> None:
        """Raises `HubError` for a file that the commit lacks or has with another content."""
        offered = self.files.get(file)
        if offered is None:
            raise HubError(f"{self.name}: incomplete: on the Hub, it has no {file}")
        if wanted.sha256 and offered.sha256 and wanted.sha256 != offered.sha256:
            raise HubError(
                f"{self.name}: {file} on the Hub is not the file that the manifest lists; ask its author to upload "
                "the bundle as it was exported"
            )

    def fetch(self, file: str, sha256: str | None = None) -> Path:
        """The path of a file, which is downloaded and hashed unless the cache has it.

        Raises `HubError`, also if the Hub cannot be reached and the file is not in the cache.
        """
        path = self.folder / file
        return path if path.exists() else ask(self.name, self.revision, lambda: self._download(file, sha256))

    def _download(self, file: str, sha256: str | None) -> Path:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.file_download import is_xet_available

        collected = False
        if file.endswith(WEIGHTS):
            url = hf_hub_url(self.name, file, revision=self.commit)
            found = get_hf_file_metadata(url, timeout=timeout())
            sha256 = sha256 or (found.etag if found.etag and _SHA256.fullmatch(found.etag) else None)
            if not (found.xet_file_data and is_xet_available()):
                collected = self._collect(file, url, found, sha256)
        path = Path(hf_hub_download(self.name, file, revision=self.commit))
        if sha256 and not collected:
            self._check(file, path, sha256)
        return path

    def _collect(self, file: str, url: str, found: Any, sha256: str | None) -> bool:
        """Downloads a file's blob into the cache, continuing where an earlier run stopped. Returns whether it did.

        It does not if the cache has the blob already, or if the cache cannot consist of links: huggingface_hub would
        copy the blob.
        """
        from huggingface_hub.file_download import are_symlinks_supported, http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        etag = found.etag or ""
        if not _BLOB_NAME.fullmatch(etag) or found.size is None or not are_symlinks_supported(cache_folder()):
            return False
        blob, partial = self._blobs / etag, self._blobs / f"{etag}{PARTIAL}"
        lock = cache_folder() / ".locks" / self._blobs.parent.name / f"{etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # the lock that huggingface_hub takes: another process waits, then finds the blob
            if blob.exists():
                return False
            with partial.open("ab") as out:
                start = out.tell()
                if start > found.size:
                    start = out.truncate(0)
                http_get(
                    url,
                    out,
                    resume_size=start,
                    headers=build_hf_headers(),
                    expected_size=found.size,
                    displayed_filename=file,
                )
            if sha256:
                self._check(file, partial, sha256)
            partial.replace(blob)
        return True

    def _check(self, file: str, path: Path, sha256: str) -> None:
        """Hashes a file that has arrived. Removes it and raises `HubError` where the hash differs."""
        with self.progress.task(f"checking {file}", path.stat().st_size, in_bytes=True) as advance:
            intact = hash_file(path, advance) == sha256
        if not intact:
            _remove(path)
            raise HubError(f"{self.name}: {file} was damaged during the download; run the command again")

    @property
    def _blobs(self) -> Path:
        return self.folder.parent.parent / "blobs"


def _remove(path: Path) -> None:
    """Removes a file and, where it is a link into the cache, what it leads to: the next run must not link it again."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _shards(index: Path) -> list[str]:
    """The files that an index names; none for a malformed one, which the reader of the checkpoint reports."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(name for name in names if isinstance(name, str) and name == Path(name).name)
