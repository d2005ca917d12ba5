"""Where engines come from: the bundle, if it has one that fits; else the user's cache; else they are built, in seconds.

An engine is code. It is loaded only from a file whose hash is in the bundle's manifest, or from our own cache: only the
user can write to its folder, and its files begin with the hash of the rest.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...bundle.bundle import Bundle
from ...bundle.files import atomic_write
from ...errors import BundleError, ExecutorError
from ...machine.gpu_targets import OLDEST, GpuTarget, gpu_of, variant_of
from .block_catalog import Catalog, ProgramSpec, VariantSpec
from .device import Context
from .trt_api import EngineRuntime, Library

Note = Callable[[str], object]

_HASH_BYTES = 32


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
                    file.write(hashlib.sha256(content).digest() + content)

    def _is_ours(self) -> bool:
        """Whether the folder is the user's own and no other may write to it."""
        if not hasattr(os, "geteuid"):
            return True  # on Windows, a folder in the profile is
        status = self.folder.stat()
        return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def read_hashed(bundle: Bundle, path: str) -> bytes:
    """A file of the bundle, read once and checked against its hash. Raises `BundleError`."""
    record = bundle.manifest.files.get(path)
    if record is None:
        raise BundleError(f"{bundle.file(path)}: is not listed in the manifest; run zimage-export engines again")
    try:
        data = bundle.file(path).read_bytes()
    except OSError as error:
        raise BundleError(f"{bundle.file(path)}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BundleError(f"{bundle.file(path)}: altered since it was written; export or download the bundle again")
    return data


def read_catalog(bundle: Bundle) -> Catalog:
    """The bundle's block programs. Raises `BundleError` where it has none."""
    path = bundle.manifest.engines
    if path is None:
        raise BundleError(
            f"{bundle.root}: has no block programs for TensorRT; `zimage-export engines {bundle.root}` adds them"
        )
    return Catalog.from_json(read_hashed(bundle, path), str(bundle.file(path)))


def variant_spec(catalog: Catalog, capability: tuple[int, int]) -> VariantSpec:
    """The programs for a GPU. Raises `ExecutorError` where the catalog has none that it can run."""
    label = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        raise ExecutorError(f"this GPU ({label}) is older than TensorRT for RTX supports; use --executor cuda or cpu")
    spec = catalog.variants.get(variant_of(capability))
    if spec is None:
        raise ExecutorError(
            f"this bundle has no block programs for this GPU ({label}), which has no bf16 and no float32 matrix "
            "products; use a bundle made with --precision fp16 or int8"
        )
    return spec


@dataclass
class EngineStore:
    """Implements `Engines` for a bundle on one GPU."""

    bundle: Bundle
    catalog: Catalog
    library: Library
    capability: tuple[int, int]
    note: Note = lambda text: None
    cache: HashedCache = field(default_factory=lambda: HashedCache(cache_folder()))
    _runtime: EngineRuntime | None = None
    _engines: dict[str, Any] = field(default_factory=dict)
    _kernels: bytes | None = None  # as read from the cache

    @property
    def spec(self) -> VariantSpec:
        """The programs for this GPU."""
        return variant_spec(self.catalog, self.capability)

    def context(self, program: str) -> Context:
        return self._loaded().context(self._engine(program))

    def close(self) -> None:
        if self._runtime is not None:
            kernels = self._runtime.cache()
            if kernels and kernels != self._kernels:
                self.cache.write(self._kernels_name(), kernels)
                self._kernels = kernels
        self._engines.clear()
        self._runtime = None

    def _loaded(self) -> EngineRuntime:
        if self._runtime is None:
            self._runtime = self.library.runtime()
            self._kernels = self.cache.read(self._kernels_name())
            self._runtime.use_cache(self._kernels)
        return self._runtime

    def _engine(self, program: str) -> Any:
        if program not in self._engines:
            self._engines[program] = self._find(self.spec.programs[program])
        return self._engines[program]

    def _find(self, program: ProgramSpec) -> Any:
        runtime = self._loaded()
        for path in self.candidates(program.name):
            engine = runtime.load(read_hashed(self.bundle, path))
            if engine is not None:
                return engine
        name = self._engine_name(program)
        cached = self.cache.read(name)
        engine = runtime.load(cached) if cached else None
        if engine is not None:
            return engine
        data = self.build(program)
        self.cache.write(name, data)
        engine = runtime.load(data)
        if engine is None:
            raise ExecutorError(
                f"{self.library.name} cannot load its own engine for {program.name}: {runtime.last_error()}"
            )
        return engine

    def candidates(self, program: str) -> list[str]:
        """Paths of the bundle's engines of a program that fit this library and GPU, those for just this GPU first."""
        fitting = [
            engine
            for engine in self.catalog.engines
            if engine.program == program
            and (engine.library, engine.version) == (self.library.name, self.library.version)
            and engine.variant is variant_of(self.capability)
            and engine.gpu.runs_on(self.capability)
        ]
        return [engine.path for engine in sorted(fitting, key=lambda engine: engine.gpu is GpuTarget.PORTABLE)]

    def build(self, program: ProgramSpec) -> bytes:
        """Builds a program's engine for this GPU, from the bundle's ONNX file."""
        gpu = gpu_of(self.capability)
        self.note(
            f"building the {program.name} engine for this GPU and {self.library.name} {self.library.version}, once"
        )
        return self.library.build(read_hashed(self.bundle, program.path), program, [gpu]).data

    def _engine_name(self, program: ProgramSpec) -> str:
        """A name made of everything that the engine depends on, so that a change of any of it is built again."""
        parts = (
            self.bundle.manifest.files[program.path].sha256,
            repr(sorted(program.profile.items())),
            self.library.name,
            self.library.version,
            gpu_of(self.capability).value,
        )
        return f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:32]}.engine"

    def _kernels_name(self) -> str:
        major, minor = self.capability
        return f"kernels-{self.library.name}-{self.library.version}-sm{major}{minor}.cache"
