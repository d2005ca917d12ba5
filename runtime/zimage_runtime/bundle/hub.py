"""Models on the Hub: a name like ``ORG/NAME`` becomes a directory in the user's cache with the files needed.

The cache, the token, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are huggingface_hub's own. A command that was
interrupted downloads only what is missing when it is run again (see `hub_download`).
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..command_line.progress import Progress
from ..model.programs import COMPONENTS
from .hub_download import Download, RemoteFile, ask, cache_folder, timeout
from .hub_errors import HubError, explain, unreachable
from .manifest import MANIFEST_NAME, Manifest

CHECKPOINT_INDEX = "model_index.json"

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_WEIGHTS = ".safetensors"
# two words of which the second is a file's name are a path
_ADAPTER = re.compile(
    rf"(?P<name>(?![^/]*/[^/]*\.safetensors$){_HUB_ID.pattern})(?:/(?P<file>[\w./ -]+\.safetensors))?"
)


@dataclass(frozen=True)
class Snapshot:
    """A model's files as they were at one commit. Files are links into the cache."""

    path: Path
    name: str  # ORG/NAME
    revision: str  # the commit


def hub_id(model: str | Path) -> str | None:
    """The model's name on the Hub, if `model` is not an existing path and looks like ``ORG/NAME``."""
    text = str(model)
    return text if not os.path.lexists(text) and _HUB_ID.fullmatch(text) else None


def bundle_directory(model: str | Path, progress: Progress | None = None) -> Path:
    """The directory of a bundle that is given as a path or by its name on the Hub. Raises `HubError`.

    A path is returned unchanged, whether it exists or not.
    """
    name = hub_id(model)
    return Hub(progress=progress or Progress()).bundle(name).path if name else Path(model)


def adapter_file(file: str, progress: Progress | None = None) -> Path:
    """The file of a LoRA that is given as a path or by its name on the Hub, ``ORG/NAME`` or ``ORG/NAME/FILE``.

    A path is returned unchanged, whether it exists or not. Raises `HubError`.
    """
    found = None if os.path.lexists(file) else _ADAPTER.fullmatch(file)
    if found is None:
        return Path(file)
    return Hub(progress=progress or Progress()).adapter(found["name"], found["file"])


@dataclass(frozen=True)
class Hub:
    """The Hub as the user has configured it."""

    progress: Progress = field(default_factory=Progress)

    def bundle(self, name: str, revision: str | None = None) -> Snapshot:
        """Downloads a bundle: its manifest, and the files that the manifest lists.

        Raises `HubError`, or `BundleError` for a manifest that this version cannot use.
        """
        with self._quietly():
            download = self._open(name, revision, MANIFEST_NAME, "a bundle")
            path = download.fetch(MANIFEST_NAME)
            manifest = Manifest.from_json(path.read_bytes(), f"{name}: {MANIFEST_NAME}")
            download.fetch_all({file: RemoteFile(r.size, r.sha256) for file, r in manifest.files.items()})
            return _snapshot(download)

    def checkpoint(self, name: str, revision: str | None = None, without: Collection[str] = ()) -> Snapshot:
        """Downloads a checkpoint in diffusers layout: configurations, tokenizer and safetensors.

        The weights of components in `without` are left out. Raises `HubError`.
        """
        with self._quietly():
            download = self._open(name, revision, CHECKPOINT_INDEX, "a checkpoint in diffusers layout")
            for file in _configurations(download.files):
                download.fetch(file, download.files[file].sha256)
            weights = [file for part in COMPONENTS if part not in without for file in download.weights(part)]
            download.fetch_all({file: download.files.get(file, RemoteFile()) for file in weights})
            return _snapshot(download)

    def adapter(self, name: str, file: str | None = None) -> Path:
        """Downloads a LoRA: the file that is named or, without a name, the only one of its kind. Raises `HubError`."""
        with self._quietly():
            wanted = file or self._only_weights(name)
            download = self._open(name, None, wanted)
            return download.fetch(wanted, download.files[wanted].sha256)

    def _only_weights(self, name: str) -> str:
        from huggingface_hub import HfApi, snapshot_download

        try:
            info = HfApi().model_info(name, timeout=timeout())
            files = [sibling.rfilename for sibling in info.siblings or []]
        except Exception as error:  # as in `_open`
            if not unreachable(error):
                raise explain(error, name, None, cache_folder()) from None
            folder = Path(ask(name, None, lambda: snapshot_download(name, local_files_only=True)))
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        found = sorted(file for file in files if file.endswith(_WEIGHTS))
        if len(found) == 1:
            return found[0]
        some = ", ".join(found[:5]) + (" and more" if len(found) > 5 else "")
        which = f"give one of its files as {name}/FILE: {some}" if found else f"it has no {_WEIGHTS} file"
        raise HubError(f"{name}: {which}")

    def file(self, name: str, file: str, revision: str | None = None) -> Path:
        """Downloads one file of weights, with the other shards of its set. Raises `HubError`."""
        with self._quietly():
            download = self._open(name, revision, file)
            wanted = [one for one in _shards_of(file) if one in download.files]
            download.fetch_all({one: download.files[one] for one in wanted})
            return download.folder / file

    def _open(self, name: str, revision: str | None, index: str, kind: str | None = None) -> Download:
        """Chooses the commit: the Hub's answer or, if it cannot be reached, what is in the cache.

        `index` is a file that a model of this kind has, and is downloaded first. Of no kind, it is what is wanted, and
        may be large: the smallest file is downloaded first.
        """
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

        try:
            found = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=timeout())
        except Exception as error:  # the HTTP libraries below huggingface_hub share no base but Exception
            reason = unreachable(error)
            path = try_to_load_from_cache(name, index, revision=revision) if reason else None
            if not reason or not isinstance(path, str):
                raise explain(error, name, revision, cache_folder()) from None
            folder = Path(path).parents[index.count("/")]
            self.progress.note(f"{name}: {reason}; using what is in the cache")
            here = [path for path in folder.rglob("*") if path.is_file()]
            files = {path.relative_to(folder).as_posix(): RemoteFile(path.stat().st_size) for path in here}
            return Download(self.progress, name, revision, folder.name, folder, files, offline=reason)
        files = {
            sibling.rfilename: RemoteFile(sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)
            for sibling in found.siblings or []
        }
        if index not in files:
            problem = f"not {kind} (on the Hub, it has no {index})" if kind else f"on the Hub, it has no {index}"
            raise HubError(f"{name}: {problem}")
        if kind is None:
            index = min(files, key=lambda file: (files[file].size, file))
        # By the name of the revision and not by the commit, so that the cache learns which commit it stands for.
        path = ask(name, revision, lambda: hf_hub_download(name, index, revision=revision))
        folder = Path(path).parents[index.count("/")]
        if folder.name != found.sha:
            raise HubError(f"{name}: changed on the Hub during the download; run the command again")
        return Download(self.progress, name, revision, folder.name, folder, files)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Keeps huggingface_hub's progress bars and messages off stderr when `progress` is quiet."""
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


def _shards_of(file: str) -> list[str]:
    """The files of the set that a shard belongs to; a file that is no shard alone."""
    match = _SHARD.fullmatch(file)
    if match is None:
        return [file]
    count = int(match[2])
    return [f"{match[1]}-{number:05d}-of-{count:05d}{match[3]}" for number in range(1, count + 1)]


def _snapshot(download: Download) -> Snapshot:
    return Snapshot(download.folder, download.name, download.commit)


def _configurations(files: Collection[str]) -> list[str]:
    """The small files that a checkpoint is read with, if it has them; the reader reports those that are missing."""
    wanted = [
        *(f"{component}/config.json" for component in COMPONENTS),
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    return [file for file in wanted if file in files]
