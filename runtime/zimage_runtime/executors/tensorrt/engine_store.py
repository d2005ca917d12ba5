"""Where engines come from: the user's own cache; else they are built from the bundle's programs, in seconds.

An engine is code. The hashes in a bundle's manifest are its maker's own, so its engines are loaded
only if the user trusts them.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...bundle.bundle import Bundle
from ...errors import BundleError, ExecutorError
from ...machine.gpu_targets import OLDEST, GpuTarget, gpu_of, variant_of
from .block_catalog import Catalog, ProgramSpec, VariantSpec
from .device import Context, ContextKey, Shapes, Stream, context_key
from .engine_cache import HashedCache, cache_folder, engine_name, kernels_name
from .trt_api import EngineRuntime, Library

Note = Callable[[str], object]

_CONTEXTS = 24
"""Contexts that are kept beyond their stage. An image of the published model needs 19 and its negative prompt 2 more:
with fewer, none would still be there when its stage runs again."""


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
        raise ExecutorError(f"this GPU ({label}) is older than TensorRT supports; use --executor cuda or cpu")
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
    trusted: bool = False  # whether the bundle's own engines are loaded
    cache: HashedCache = field(default_factory=lambda: HashedCache(cache_folder()))
    _runtime: EngineRuntime | None = None
    _engines: dict[str, Any] = field(default_factory=dict)
    _contexts: OrderedDict[ContextKey, Context] = field(default_factory=OrderedDict)  # used least recently first
    _kernels: bytes = b""  # the hash of those in the cache
    _compiling: bool = False  # whether contexts were made since kernels were last stored

    @property
    def spec(self) -> VariantSpec:
        """The programs for this GPU."""
        return variant_spec(self.catalog, self.capability)

    def load(self, program: str) -> None:
        """Loads a program's engine, where that has not happened. Raises `ExecutorError` with the library's reason."""
        self._engine(program)

    def context(self, program: str, shapes: Shapes, stream: Stream) -> Context:
        key = context_key(program, shapes)
        if key not in self._contexts:
            self._contexts[key] = self._loaded().context(self._engine(program), shapes, stream)
            self._compiling = True
        self._contexts.move_to_end(key)
        while len(self._contexts) > _CONTEXTS:
            self._contexts.popitem(last=False)
        return self._contexts[key]

    def save(self) -> None:
        if self._runtime is None or not self._compiling:
            return
        self._compiling = False
        kernels = self._runtime.cache()
        if kernels and (digest := hashlib.sha256(kernels).digest()) != self._kernels:
            self.cache.write(self._kernels_name(), kernels)
            self._kernels = digest

    def close(self) -> None:
        self.save()
        self._contexts.clear()
        self._engines.clear()
        self._runtime = None

    def _loaded(self) -> EngineRuntime:
        if self._runtime is None:
            self._runtime = self.library.runtime()
            kernels = self.cache.read(self._kernels_name())
            self._kernels = hashlib.sha256(kernels).digest() if kernels else b""
            self._runtime.use_cache(kernels)
        return self._runtime

    def _engine(self, program: str) -> Any:
        if program not in self._engines:
            self._engines[program] = self._find(self.spec.programs[program])
        return self._engines[program]

    def _find(self, program: ProgramSpec) -> Any:
        runtime = self._loaded()
        for data in self._ready_made(program):
            engine = runtime.load(data)
            if engine is not None:
                return engine
        data = self.build(program)
        self.cache.write(self._engine_name(program, gpu_of(self.capability)), data)
        engine = runtime.load(data)
        if engine is None:
            raise ExecutorError(
                f"{self.library.name} cannot load its own engine for {program.name}: {runtime.last_error()}"
            )
        return engine

    def _ready_made(self, program: ProgramSpec) -> Iterator[bytes]:
        """Engines of a program that exist and should fit, the best first."""
        for gpu in dict.fromkeys((gpu_of(self.capability), GpuTarget.PORTABLE)):
            cached = self.cache.read(self._engine_name(program, gpu)) if gpu.runs_on(self.capability) else None
            if cached:
                yield cached
        if self.trusted:
            for path in self.candidates(program.name):
                yield read_hashed(self.bundle, path)

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

    def _engine_name(self, program: ProgramSpec, gpu: GpuTarget) -> str:
        return engine_name(self.library.builder, program, self._sha256(program), gpu)

    def _kernels_name(self) -> str:
        programs = (self._sha256(program) for program in self.spec.programs.values())
        return kernels_name(self.library.builder, programs, self.capability)

    def _sha256(self, program: ProgramSpec) -> str:
        record = self.bundle.manifest.files.get(program.path)
        if record is None:
            raise BundleError(f"{self.bundle.file(program.path)}: is not listed in the manifest; export it again")
        return record.sha256
