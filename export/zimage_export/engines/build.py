"""Block programs and TensorRT engines for a bundle, written into its `engines/` folder.

Needs neither a GPU nor weights in memory: the weights' types are read from their files' headers, and engines contain no
weights. The scratch memory of a program at several sizes is read from TensorRT's build log, so that memory can be
planned without a GPU.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from zimage_runtime.adapters.branches import RANK_UNIT
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.files import atomic_write
from zimage_runtime.bundle.manifest import ENGINES_FOLDER, FileRecord, Precision, write_manifest
from zimage_runtime.bundle.tensors import DType, TensorEntry, read_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.executors.tensorrt.block_catalog import (
    FREE_RANK,
    MOST_RANK,
    BlockSpec,
    Catalog,
    EngineSpec,
    InputSpec,
    ProgramSpec,
    VariantSpec,
)
from zimage_runtime.executors.tensorrt.engine_cache import HashedCache, cache_folder, engine_name
from zimage_runtime.executors.tensorrt.stage_sizes import BAND_POSITIONS
from zimage_runtime.executors.tensorrt.trt_api import Built, Library
from zimage_runtime.executors.worker import Worker
from zimage_runtime.machine.gpu_targets import GpuTarget, Variant
from zimage_runtime.model.block_signatures import BLOCK_SIGNATURES
from zimage_runtime.model.blocks import BAND, MAP, MAP_OUT, BlockKind, all_blocks
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.tokenizer import MAX_PROMPT_TOKENS
from zimage_runtime.tiles.tiling import TILE_ROWS

from ..errors import ExportError
from ..graphs.builder import ONNX_TYPES
from ..graphs.tensorrt_layers import RANK
from ..storage.folds import read_folds
from .block_graphs import BlockProgram, build_blocks
from .types import EngineTypes

IMAGE_TOKENS = 128 * 128
"""The most image tokens that engines accept: those of a 2048 x 2048 image."""

LATENT_SIDE = 256
"""The most rows or columns of latents that the autoencoder's engines accept: those of 2048 pixels."""

_USUAL_IMAGE_TOKENS = 64 * 64  # 1024 x 1024
_USUAL_CAPTION_TOKENS = 128
_USUAL_SIDE = 128
_USUAL_RANK = 32
_SIDES_MEASURED = (64,)
_TILE_COLUMNS = (64, 512)


@dataclass(frozen=True)
class Sizes:
    """How large a program's free inputs may be."""

    least: int
    usual: int
    most: int
    measured: tuple[int, ...]  # where scratch memory is measured


def add_engines(
    bundle: Bundle, gpus: Sequence[GpuTarget] = (), progress: Progress | None = None, *, lora: bool = False
) -> Bundle:
    """Writes or replaces a bundle's block programs and engines and returns the bundle, opened again.

    With `lora`, those that take LoRA come too.

    Engines are written to the user's own cache too, from where they are loaded on this machine: those in a bundle are
    for users who trust its maker. Without `gpus`: portable and Turing. File names contain a hash of the
    content, and the manifest is replaced last: a killed run leaves the bundle as it was, with at most a few files that
    the next one removes. Raises `ExportError`, or `ExecutorError` where TensorRT is missing or refuses a program.
    """
    library = _OwnThread(Library(), Worker("engines"))
    targets = list(dict.fromkeys(gpus)) or [GpuTarget.PORTABLE, GpuTarget.SM75]
    writer = _Writer(bundle.root)
    specs: dict[Variant, VariantSpec] = {}
    engines: list[EngineSpec] = []
    with (progress or Progress(quiet=True)).task("engines", len(Variant)) as advance:
        for variant in Variant:
            if wanted := [gpu for gpu in targets if gpu.variant is variant]:
                programs = bundle_blocks(bundle, variant, lora=lora)
                specs[variant], built = _build(library, programs, variant, wanted, bundle, writer)
                engines += built
            advance(1)
    catalog = writer.write("blocks", "json", Catalog(specs, tuple(engines)).to_json().encode())
    kept = {path: record for path, record in bundle.manifest.files.items() if not path.startswith(ENGINES_FOLDER)}
    manifest = dataclasses.replace(bundle.manifest, files={**kept, **writer.files}, engines=catalog)
    write_manifest(bundle.root, manifest)
    writer.remove_others()
    return Bundle.open(bundle.root)


@dataclass(frozen=True)
class _OwnThread:
    """TensorRT's builder on a thread of its own, so that Ctrl-C ends a command after the engine at work.

    On the main thread, the handler's exception may be raised in our logger: TensorRT prints it there, and goes on.
    """

    library: Library
    worker: Worker

    @property
    def name(self) -> str:
        """The package's name."""
        return self.library.name

    @property
    def version(self) -> str:
        """The package's version."""
        return self.library.version

    def build(self, onnx: bytes, spec: ProgramSpec, gpus: Sequence[GpuTarget], *, detailed: bool = False) -> Built:
        """As `Library.build`."""
        return self.worker.call(lambda: self.library.build(onnx, spec, gpus, detailed=detailed))


def half_type(precision: str, variant: Variant) -> DType:
    """The element type of 16-bit products. Other weights are converted when uploaded: folds keep fp16's range."""
    if precision == "fp16" or variant is Variant.TURING:
        return DType.F16
    return DType.BF16


def check_engine_precision(precision: Precision) -> None:
    """Raises `ExportError` for a precision that block programs do not multiply in."""
    if precision is Precision.INT4:
        raise ExportError("TensorRT's block programs do not support int4 weights; use an int8, bf16 or fp16 bundle")


def bundle_blocks(bundle: Bundle, variant: Variant, *, lora: bool = False) -> list[BlockProgram]:
    """A bundle's block programs, which depend on how its weights are stored and folded."""
    headers = {component: read_header(bundle.file(path)) for component, path in bundle.manifest.weights.items()}
    check_engine_precision(bundle.manifest.precision)
    precision = bundle.manifest.precision.value

    def stored(component: str, name: str, shape: tuple[int, ...]) -> DType:
        entry: TensorEntry | None = headers[component].get(name)
        if entry is None:
            raise ExportError(f"{bundle.root}: tensor {name} not found; export the bundle again")
        return DType(entry.dtype)

    types = EngineTypes(stored, variant, half_type(precision, variant))
    return build_blocks(bundle.manifest.config, types, read_folds(bundle.manifest.folds), lora=lora)


def program_spec(program: BlockProgram, config: ModelConfig, path: str, most: int | None = None) -> ProgramSpec:
    """A program's entry in the catalog, without its scratch memory. `most` replaces the profile's largest size."""
    sizes = program_sizes(program, config)
    if most is not None:
        sizes = dataclasses.replace(sizes, usual=most, most=most)
    signature = BLOCK_SIGNATURES[program.kind]
    inputs = {value.name: value.type.tensor_type for value in program.model.graph.input}
    names = [name for name in inputs if name not in signature.inputs and name not in program.branches]
    scalars = tuple(next(iter(program.scalars.values())))
    outputs = {value.name: value.type.tensor_type for value in program.model.graph.output}
    maps = [_dtype(value.elem_type) for name, value in {**inputs, **outputs}.items() if name in (MAP, MAP_OUT, BAND)]
    profile = {}
    for name in signature.inputs:
        dims = [dim.dim_param or dim.dim_value for dim in inputs[name].shape.dim]
        if any(isinstance(dim, str) for dim in dims):
            least, usual, largest = (_free_sizes(dims, size) for size in (sizes.least, sizes.usual, sizes.most))
            profile[name] = (_free_sizes(dims, 1) if name == BAND else least, usual, largest)
    branches = {}
    for name in program.branches:
        dims = [dim.dim_param or dim.dim_value for dim in inputs[name].shape.dim]
        branches[name] = InputSpec(_dtype(inputs[name].elem_type), _free_sizes(dims, FREE_RANK))
        if RANK in dims:
            least, usual, largest = (_free_sizes(dims, rank) for rank in (RANK_UNIT, _USUAL_RANK, MOST_RANK))
            profile[name] = (least, usual, largest)
    return ProgramSpec(
        program.name,
        program.kind,
        path,
        {name: _input_spec(inputs[name], program.parts.get(name, ())) for name in names if name not in scalars},
        scalars,
        maps[0] if maps else DType.F32,
        profile,
        ((1, 0),),
        branches,
    )


def _input_spec(value: onnx.TypeProto.Tensor, parts: tuple[str, ...]) -> InputSpec:
    dtype, shape = _dtype(value.elem_type), tuple(dim.dim_value for dim in value.shape.dim)
    return InputSpec(dtype, shape, parts, transposed=dtype is DType.I8)


def program_sizes(program: BlockProgram, config: ModelConfig) -> Sizes:
    """How large a program's free inputs may be: tokens, or rows and columns of its map."""
    if program.kind.component == "vae":
        # the largest, of a program that serves several levels
        scales = [place.scale for place in all_blocks(config) if place.key in program.scalars]
        most = LATENT_SIDE * max(scales)
        if program.kind is BlockKind.DECODER_TILE:
            return Sizes(3, _USUAL_SIDE * max(scales), most + 2, (*(c for c in _TILE_COLUMNS if c < most), most + 2))
        if program.kind is BlockKind.MIDDLE_ATTENTION:
            return Sizes(2, _USUAL_SIDE, most, (*_SIDES_MEASURED, _USUAL_SIDE, most))
        measured = tuple(side * max(scales) for side in _SIDES_MEASURED)
        return Sizes(2 * min(scales), _USUAL_SIDE * max(scales), most, (*measured, most))
    if program.kind in (BlockKind.TEXT_LAYER, BlockKind.CAPTION_EMBEDDER):
        return Sizes(1, _USUAL_CAPTION_TOKENS, MAX_PROMPT_TOKENS, (_USUAL_CAPTION_TOKENS, MAX_PROMPT_TOKENS))
    if program.kind is BlockKind.TRANSFORMER_BLOCK:
        usual, most = _USUAL_IMAGE_TOKENS + _USUAL_CAPTION_TOKENS, IMAGE_TOKENS + MAX_PROMPT_TOKENS
        return Sizes(1, usual, most, (_USUAL_CAPTION_TOKENS, usual, most))
    return Sizes(1, _USUAL_IMAGE_TOKENS, IMAGE_TOKENS, (_USUAL_CAPTION_TOKENS, _USUAL_IMAGE_TOKENS, IMAGE_TOKENS))


def _free_sizes(dims: Sequence[str | int], size: int) -> tuple[int, ...]:
    """A shape whose free dimensions are of one size; a tile has few rows, and a band positions of a square."""
    limited = {"rows": min(size, TILE_ROWS + 2), "queries": min(size**2, BAND_POSITIONS)}
    return tuple(limited.get(dim, size) if isinstance(dim, str) else dim for dim in dims)


def _dtype(element: int) -> DType:
    return next(dtype for dtype, number in ONNX_TYPES.items() if number == element)


def _build(
    library: "_OwnThread",
    programs: Iterable[BlockProgram],
    variant: Variant,
    gpus: Sequence[GpuTarget],
    bundle: Bundle,
    writer: "_Writer",
) -> tuple[VariantSpec, list[EngineSpec]]:
    specs: dict[str, ProgramSpec] = {}
    blocks: dict[str, BlockSpec] = {}
    engines: list[EngineSpec] = []
    precision, cache = bundle.manifest.precision.value, HashedCache(cache_folder())
    for program in programs:
        onnx_bytes = program.model.SerializeToString(deterministic=True)
        path = writer.write(f"{program.name}-{precision}-{variant}", "onnx", onnx_bytes)
        spec = program_spec(program, bundle.manifest.config, path)
        most = program_sizes(program, bundle.manifest.config).most
        scratch: dict[int, int | None] = {}
        for gpu in gpus:
            built = library.build(onnx_bytes, spec, [gpu], detailed=True)
            name = f"{program.name}-{precision}-{gpu}-max{most}-{library.name}{library.version}"
            file = writer.write(name, "engine", built.data)
            cache.write(
                engine_name(library.library.builder, spec, hashlib.sha256(onnx_bytes).hexdigest(), gpu), built.data
            )
            engines.append(EngineSpec(file, program.name, variant, gpu, library.name, library.version))
            scratch[most] = built.activation_bytes
        points = measure_scratch(library, program, bundle.manifest.config, gpus[0], scratch)
        specs[program.name] = dataclasses.replace(spec, scratch=points)
        for key, scalars in program.scalars.items():
            if program.branches:
                blocks[key] = dataclasses.replace(blocks[key], extended=program.name)
            else:
                blocks[key] = BlockSpec(program.name, scalars)
    return VariantSpec(specs, blocks), engines


def measure_scratch(
    library: "Library | _OwnThread",
    program: BlockProgram,
    config: ModelConfig,
    gpu: GpuTarget,
    known: Mapping[int, int | None],
) -> tuple[tuple[int, int], ...]:
    """Scratch memory at several sizes: (tokens, or rows times columns; bytes). `known` is by size, from other builds.

    It never decreases, as larger images run in the same engine.
    """
    onnx_bytes = program.model.SerializeToString(deterministic=True)
    found: list[tuple[int, int]] = []
    for size in program_sizes(program, config).measured:
        spec = program_spec(program, config, "", size)
        nbytes = (
            known[size] if size in known else library.build(onnx_bytes, spec, [gpu], detailed=True).activation_bytes
        )
        if nbytes is None:
            raise ExportError(
                f"TensorRT's build log does not report the memory that {program.name} needs; use TensorRT for RTX 1.7"
            )
        found.append((_positions(spec), max(nbytes, found[-1][1] if found else 0)))
    return tuple(found)


def _positions(spec: ProgramSpec) -> int:
    """Tokens, or rows times columns, of the largest value of a profile."""
    least, _, most = next(iter(spec.profile.values()))
    return math.prod(high for low, high in zip(least, most, strict=True) if low < high)


class _Writer:
    """Files of the engines' folder, named by their content."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.files: dict[str, FileRecord] = {}

    def write(self, name: str, suffix: str, data: bytes) -> str:
        """Writes one and returns its path inside the bundle."""
        digest = hashlib.sha256(data).hexdigest()
        path = f"{ENGINES_FOLDER}{name}-{digest[:8]}.{suffix}"
        place = self._root / path
        place.parent.mkdir(exist_ok=True)
        with atomic_write(place) as file:
            file.write(data)
        self.files[path] = FileRecord(len(data), digest)
        return path

    def remove_others(self) -> None:
        """Removes files that earlier runs left in the folder and that the manifest no longer lists."""
        for path in (self._root / ENGINES_FOLDER).iterdir():
            if path.is_file() and f"{ENGINES_FOLDER}{path.name}" not in self.files:
                path.unlink()
