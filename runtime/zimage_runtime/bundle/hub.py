"""Models on the Hub: a name like ``ORG/NAME`` becomes a directory in the user's cache that holds the files needed.

The cache, the token, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are huggingface_hub's own. What it does not do
is to go on with a file after the process that fetched it has ended; here, weights are collected under the name
``blobs/<etag>.incomplete`` of its cache, so that running a command again fetches only what is missing.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..command_line.progress import Progress
from ..model.programs import COMPONENTS
from .files import hash_file
from .hub_errors import HubError, explain, not_cached, unreachable
from .manifest import MANIFEST_NAME, Manifest

CHECKPOINT_INDEX = "model_index.json"

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_BLOB_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPARE = 64 << 20  # bytes for the small files and the file system's own needs

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """A model's files as they were at one commit. Files are links into the cache."""

    path: Path
    name: str  # ORG/NAME
    revision: str  # the commit


def hub_id(model: str | Path) -> str | None:
    """The model's name on the Hub, if `model` is no path that exists and looks like ``ORG/NAME``."""
    text = str(model)
    return text if not os.path.lexists(text) and _HUB_ID.fullmatch(text) else None


def bundle_directory(model: str | Path, progress: Progress | None = None) -> Path:
    """The directory of a bundle that is given as a path or by its name on the Hub. Raises `HubError`.

    A path is returned as it is, whether it exists or not.
    """
    name = hub_id(model)
    return Hub(progress=progress or Progress()).bundle(name).path if name else Path(model)


@dataclass(frozen=True)
class Hub:
    """The Hub as the user has set it up."""

    progress: Progress = field(default_factory=Progress)

    def bundle(self, name: str, revision: str | None = None) -> Snapshot:
        """Fetches a bundle: its manifest, and the files that the manifest lists.

        Raises `HubError`, or `BundleError` for a manifest that this version cannot use.
        """
        with self._quietly():
            download = self._open(name, revision, MANIFEST_NAME, "a bundle")
            path = download.fetch(MANIFEST_NAME)
            manifest = Manifest.from_json(path.read_bytes(), f"{name}: {MANIFEST_NAME}")
            download.fetch_all({file: record.size for file, record in manifest.files.items()})
            return download.snapshot

    def checkpoint(self, name: str, revision: str | None = None, without: Collection[str] = ()) -> Snapshot:
        """Fetches a checkpoint in diffusers layout: configurations, tokenizer and safetensors.

        The weights of components in `without` are left out. Raises `HubError`.
        """
        with self._quietly():
            download = self._open(name, revision, CHECKPOINT_INDEX, "a checkpoint in diffusers layout")
            for file in _configurations(download.files):
                download.fetch(file)
            weights = [file for part in COMPONENTS if part not in without for file in download.weights(part)]
            download.fetch_all({file: download.files.get(file) or 0 for file in weights})
            return download.snapshot

    def _open(self, name: str, revision: str | None, index: str, kind: str) -> "_Download":
        """Settles on a commit: what the Hub says, or where it cannot be reached, what the cache holds."""
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

        try:
            found = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_timeout())
        except Exception as error:  # the HTTP libraries below huggingface_hub share no base but Exception
            reason = unreachable(error)
            path = try_to_load_from_cache(name, index, revision=revision) if reason else None
            if not reason or not isinstance(path, str):
                raise explain(error, name, revision, self.cache_folder) from None
            folder = Path(path).parent
            self.progress.note(f"{name}: {reason}; using what is in the cache")
            files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
            return _Download(self, name, revision, folder.name, folder, files, offline=reason)
        files = {sibling.rfilename: sibling.size or 0 for sibling in found.siblings or []}
        if index not in files:
            raise HubError(f"{name}: not {kind} (on the Hub, it has no {index})")
        # By the name of the revision and not by the commit, so that the cache learns which commit it stands for.
        path = self.ask(name, revision, lambda: hf_hub_download(name, index, revision=revision))
        folder = Path(path).parent
        if folder.name != found.sha:
            raise HubError(f"{name}: changed on the Hub at this moment; run the command again")
        return _Download(self, name, revision, folder.name, folder, files)

    def ask(self, name: str, revision: str | None, call: Callable[[], T]) -> T:
        """Calls huggingface_hub, and says in one line what went wrong."""
        try:
            return call()
        except Exception as error:  # see `_open`
            raise explain(error, name, revision, self.cache_folder) from None

    @property
    def cache_folder(self) -> Path:
        """Where the cache is."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Keeps huggingface_hub's bars and remarks off stderr where nobody wants them."""
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
            logging,
        )

        if not self.progress.quiet:
            yield
            return
        verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
        logging.set_verbosity(logging.ERROR)
        if bars:
            disable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                enable_progress_bars()


@dataclass(frozen=True)
class _Download:
    """One commit of a model, and what of it is wanted."""

    hub: Hub
    name: str
    revision: str | None  # as the user gave it
    commit: str
    folder: Path  # in the cache
    files: Mapping[str, int]  # sizes of all files that the commit has, as far as they are known
    offline: str | None = None  # why the Hub is not asked

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.folder, self.name, self.commit)

    def weights(self, component: str) -> list[str]:
        """The safetensors files of a component: those that its index names, or the only one; no variants."""
        inside = sorted(file for file in self.files if file.startswith(f"{component}/"))
        indices = [file for file in inside if file.endswith(".safetensors.index.json") and file.count(".") == 3]
        single = [file for file in inside if file.endswith(".safetensors") and file.count(".") == 1]
        if indices:
            return [f"{component}/{shard}" for shard in _shards(self.fetch(indices[0]))]
        if len(single) != 1 and self.offline:
            raise not_cached(self.name, self.offline, f"what {component} is made of")
        if len(single) != 1:
            raise HubError(
                f"{self.name}: {component} holds {len(single)} safetensors files and no index; "
                "use a checkpoint whose weights are stored as safetensors"
            )
        return single

    def fetch_all(self, sizes: Mapping[str, int]) -> None:
        """Fetches what the cache lacks. Raises `HubError` where the disk has no room for it."""
        missing = [file for file in sizes if not (self.folder / file).exists()]
        if not missing:
            return
        if self.offline:
            raise not_cached(self.name, self.offline, missing[0])
        absent = [file for file in missing if file not in self.files]
        if absent:
            raise HubError(f"{self.name}: incomplete: on the Hub, it has no {absent[0]}")
        total = sum(sizes[file] for file in missing)
        here = sum(path.stat().st_size for path in self._blobs.glob("*.incomplete"))
        free = shutil.disk_usage(self.folder).free
        if total - here + _SPARE > free:
            raise HubError(
                f"{self.hub.cache_folder}: no space left: {self.name} takes {total / 1e9:.2f} GB more, "
                f"{free / 1e9:.2f} GB is free; set HF_HOME to a folder with more room"
            )
        self.hub.progress.note(
            f"fetching {len(missing)} files, {total / 1e9:.2f} GB, of {self.name} at {self.commit[:12]}"
        )
        for file in missing:
            self.fetch(file)

    def fetch(self, file: str) -> Path:
        """The path of a file, which is fetched unless the cache has it. Where the Hub is out of reach, it must."""
        from huggingface_hub import hf_hub_download

        if (self.folder / file).exists():
            return self.folder / file

        def call() -> str:
            if file.endswith(".safetensors"):
                self._collect(file)
            return hf_hub_download(self.name, file, revision=self.commit)

        return Path(self.hub.ask(self.name, self.revision, call))

    def _collect(self, file: str) -> None:
        """Brings a file's blob into the cache, going on where an earlier run stopped.

        Does nothing where the cache cannot be of links: there, huggingface_hub would copy the blob.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import are_symlinks_supported, http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        url = hf_hub_url(self.name, file, revision=self.commit)
        found = get_hf_file_metadata(url, timeout=_timeout())
        etag = found.etag or ""
        if not _BLOB_NAME.fullmatch(etag) or found.size is None or not are_symlinks_supported(self.hub.cache_folder):
            return
        blob, partial = self._blobs / etag, self._blobs / f"{etag}.incomplete"
        lock = self.hub.cache_folder / ".locks" / self._blobs.parent.name / f"{etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # as huggingface_hub does, against a second process
            if blob.exists():
                return
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
            if start and _SHA256.fullmatch(etag):
                with self.hub.progress.task("checking", found.size, in_bytes=True) as advance:
                    intact = hash_file(partial, advance) == etag
                if not intact:
                    partial.unlink()
                    raise HubError(f"{self.name}: {file} was damaged on the way; run the command again")
            partial.replace(blob)

    @property
    def _blobs(self) -> Path:
        return self.folder.parent.parent / "blobs"


def _configurations(files: Collection[str]) -> list[str]:
    """The small files that a checkpoint is read with, as far as it has them; the reader says which are missing."""
    wanted = [
        *(f"{component}/config.json" for component in COMPONENTS),
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    return [file for file in wanted if file in files]


def _shards(index: Path) -> list[str]:
    """The files that an index names; of a malformed one none, for the reader of the checkpoint to complain of."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(name for name in names if isinstance(name, str) and name == Path(name).name)


def _timeout() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT)
