"""The user's own folder of engines and compiled kernels. Both are code: they are loaded from here and nowhere else.

Only the user can write to the folder. Its files begin with the hash of the rest, are readable by the user alone, and
are written under a temporary name and then renamed.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...bundle.files import atomic_write
from ...machine.gpu_targets import GpuTarget
from .block_catalog import ProgramSpec

_HASH_BYTES = 32

_FORMAT = "2"
"""Of what an engine's name is made from, and of how engines are built beyond the builder's flags."""


def cache_folder() -> Path:
    """The user's cache of engines and compiled kernels."""
    if os.name == "nt":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "zimage-rt" / "tensorrt"


@dataclass(frozen=True)
class HashedCache:
    """A folder of files that begin with the SHA-256 of the rest. If it cannot be used, that only costs time."""

    folder: Path

    def read(self, name: str) -> bytes | None:
        """The content of a file; None where it is missing or damaged, or where another user could have written it."""
        with contextlib.suppress(OSError):
            if not self._is_ours():
                return None
            data = (self.folder / name).read_bytes()
            digest, content = data[:_HASH_BYTES], data[_HASH_BYTES:]
            if hashlib.sha256(content).digest() == digest:
                return content
        return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, if the folder is the user's own and can be written to."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._is_ours():
                with atomic_write(self.folder / name) as file:
                    if sys.platform != "win32":  # where files in the profile are the user's own anyway
                        os.fchmod(file.fileno(), 0o600)
                    file.write(hashlib.sha256(content).digest() + content)

    def _is_ours(self) -> bool:
        """Whether the folder is the user's own and no other may write to it."""
        if not hasattr(os, "geteuid"):
            return True  # on Windows, a folder in the profile is
        status = self.folder.stat()
        return status.st_uid == os.geteuid() and not status.st_mode & 0o022


@dataclass(frozen=True)
class Builder:
    """What builds engines: the package, its version, and the flags that it is given."""

    library: str
    version: str
    flags: tuple[str, ...] = ()


def engine_name(builder: Builder, program: ProgramSpec, onnx_sha256: str, gpu: GpuTarget) -> str:
    """A file's name, made of everything that an engine depends on: a change of any of it is built again.

    The program's types are part of its ONNX file.
    """
    profile = repr(sorted(program.profile.items()))
    parts = (_FORMAT, onnx_sha256, profile, builder.library, builder.version, *builder.flags, gpu.value)
    return f"{_digest(parts)}.engine"


def kernels_name(builder: Builder, onnx_sha256s: Iterable[str], capability: tuple[int, int]) -> str:
    """The name of the file of kernels compiled for a set of programs on a GPU.

    NVIDIA warns that large files load slowly, so other sets of programs have files of their own.
    """
    major, minor = capability
    programs = _digest((_FORMAT, *builder.flags, *sorted(onnx_sha256s)))[:16]
    return f"kernels-{builder.library}-{builder.version}-sm{major}{minor}-{programs}.cache"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
