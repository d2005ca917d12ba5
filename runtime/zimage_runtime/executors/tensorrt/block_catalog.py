"""``engines/blocks.json``: a bundle's block programs and their inputs, which block runs which, and built engines."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ...bundle.manifest import checked_path
from ...bundle.tensors import DType
from ...checked_json import Fields
from ...errors import BundleError, ConfigError
from ...machine.gpu_targets import GpuTarget, Variant
from ...model.blocks import BlockKind, BlockPlace

CATALOG_PATH = "engines/blocks.json"
SCHEMA_VERSION = 2
"""2: weights of several tensors, int8 weights as [out, in], scratch memory that TensorRT allocates nothing beside."""

ALIGNMENT = 256
"""Bytes: TensorRT requires that every tensor starts at a multiple of this on the device."""

FREE_RANK = 0
"""In a shape, the rank of LoRA: it is the same for all of a stage's branches, filled up with zeros."""

MOST_RANK = 512
"""The largest rank that programs take: of the files that change a layer, together."""

_BETWEEN = 2 << 20
"""Bytes; with 1 % more than three times the largest error of an interpolation that TensorRT's builder showed."""


def aligned(nbytes: int) -> int:
    """Bytes that a tensor occupies on the device."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class InputSpec:
    """A weight that a program has as an input.

    Linears that read the same values are one input: their tensors one after the other, along the first axis.
    """

    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[str, ...] = ()  # the tensors that it consists of; where there are none, the one of its own name
    transposed: bool = False  # from [in, out], as int8 weights are stored, to [out, in]

    @property
    def nbytes(self) -> int:
        """Bytes, without alignment."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class ProgramSpec:
    """One block program."""

    name: str
    kind: BlockKind
    path: str  # of the ONNX file in the bundle
    weights: Mapping[str, InputSpec]
    scalars: tuple[str, ...]
    map_dtype: DType  # of feature maps; float32 where there are none
    profile: Mapping[
        str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    ]  # by input: smallest, usual, largest
    scratch: tuple[tuple[int, int], ...]  # (positions of the first free input, bytes), ascending
    branches: Mapping[str, InputSpec] = field(default_factory=dict)  # LoRA's; `FREE_RANK` stands for their rank

    def branch_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the branches' inputs with a free dimension, for a rank."""
        shapes = {name: branch.shape for name, branch in self.branches.items() if FREE_RANK in branch.shape}
        return {name: tuple(size or rank for size in shape) for name, shape in shapes.items()}

    @property
    def largest(self) -> int:
        """The most tokens, or rows or columns, that the profile of its first input allows."""
        least, _, most = next(iter(self.profile.values()))
        return max((high for low, high in zip(least, most, strict=True) if low < high), default=0)

    def takes(self, rows: int, columns: int) -> bool:
        """Whether a map of this size is within its profile, and within the sizes whose scratch memory is known."""
        return max(rows, columns) <= self.largest and rows * columns <= self.scratch[-1][0]

    def scratch_bytes(self, positions: int) -> int:
        """Bytes that the program needs besides its inputs and outputs.

        Interpolated between the sizes that were measured, with a little more, for it does not grow quite evenly. The
        last of them is the largest in the profile.
        """
        points = self.scratch
        if positions <= points[0][0]:
            return points[0][1]
        for (low, low_bytes), (high, high_bytes) in itertools.pairwise(points):
            if positions < high:
                between = low_bytes + -(-(high_bytes - low_bytes) * (positions - low) // (high - low))
                return low_bytes if positions == low else between + between // 100 + _BETWEEN
        return points[-1][1]

    def positions(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens, or rows times columns, of shapes of its free inputs: what its scratch memory depends on."""
        name, (least, _, most) = next(iter(self.profile.items()))
        return math.prod(size for size, low, high in zip(shapes[name], least, most, strict=True) if low < high)

    def needing(self, positions: int, nbytes: int) -> "ProgramSpec":
        """The same program, now known to need this much scratch memory at a size, and no less at larger ones."""
        smaller = [point for point in self.scratch if point[0] < positions]
        larger = [(size, max(known, nbytes)) for size, known in self.scratch if size > positions]
        return replace(self, scratch=(*smaller, (positions, nbytes), *larger))


@dataclass(frozen=True)
class BlockSpec:
    """What one block of the model runs."""

    program: str
    scalars: Mapping[str, float]
    extended: str = ""  # the program that takes LoRA, with the same weights and scalars; empty where there is none


@dataclass(frozen=True)
class EngineSpec:
    """An engine that is in the bundle."""

    path: str
    program: str
    variant: Variant
    gpu: GpuTarget
    library: str  # tensorrt_rtx or tensorrt
    version: str


@dataclass(frozen=True)
class VariantSpec:
    """The programs for one set of GPU generations."""

    programs: Mapping[str, ProgramSpec]
    blocks: Mapping[str, BlockSpec]  # by `BlockPlace.key`

    def program_of(self, place: BlockPlace, *, lora: bool = False) -> ProgramSpec:
        """The program that a block runs; with `lora`, the one that takes LoRA.

        Raises `BundleError` for a block that is not in the catalog.
        """
        block = self.blocks.get(place.key)
        if block is None:
            raise BundleError(f"{CATALOG_PATH}: has no program for {place.key}; run zimage-export engines again")
        if lora and not block.extended:
            raise BundleError(f"{CATALOG_PATH}: has no program that takes LoRA; run zimage-export engines with --lora")
        return self.programs[block.extended if lora else block.program]

    def needing(self, program: str, positions: int, nbytes: int) -> "VariantSpec":
        """The same programs, one of which needs more scratch memory at a size."""
        return replace(self, programs={**self.programs, program: self.programs[program].needing(positions, nbytes)})


@dataclass(frozen=True)
class Catalog:
    """The contents of the file."""

    variants: Mapping[Variant, VariantSpec]
    engines: tuple[EngineSpec, ...] = ()

    def to_json(self) -> str:
        """The file's text."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "variants": {variant.value: _variant_json(spec) for variant, spec in self.variants.items()},
            "engines": [vars(engine) for engine in self.engines],
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Raises `BundleError` for anything that this version cannot use."""
        try:
            return cls._read(Fields(json.loads(text), where))
        except (ValueError, RecursionError):
            raise BundleError(f"{where}: not valid JSON; the bundle is damaged, export or download it again") from None
        except ConfigError as error:
            raise BundleError(str(error)) from None

    @classmethod
    def _read(cls, fields: Fields) -> Self:
        where = fields.where
        version = fields.integer("schema_version")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{where}: written for schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade zimage-rt"
            )
        if version < SCHEMA_VERSION:
            raise BundleError(
                f"{where}: written by an earlier version of zimage-export; run zimage-export engines again"
            )
        variants = fields.object("variants")
        return cls(
            {
                Variant(name): _variant(variants.object(name), where)
                for name in variants.names()
                if name in list(Variant)
            },
            tuple(_engine(entry, where) for entry in _list(fields, "engines")),
        )


def _variant_json(spec: VariantSpec) -> dict[str, Any]:
    return {
        "programs": {
            name: {
                "kind": program.kind.value,
                "path": program.path,
                "weights": {key: _weight_json(weight) for key, weight in program.weights.items()},
                "scalars": list(program.scalars),
                "map_dtype": program.map_dtype.value,
                "profile": {key: [list(shape) for shape in shapes] for key, shapes in program.profile.items()},
                "scratch": [list(point) for point in program.scratch],
                "branches": {key: _weight_json(branch) for key, branch in program.branches.items()},
            }
            for name, program in spec.programs.items()
        },
        "blocks": {
            key: {
                "program": block.program,
                "scalars": dict(block.scalars),
                **({"extended": block.extended} if block.extended else {}),
            }
            for key, block in spec.blocks.items()
        },
    }


def _weight_json(weight: InputSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"dtype": weight.dtype.value, "shape": list(weight.shape)}
    if weight.parts:
        found["parts"] = list(weight.parts)
    if weight.transposed:
        found["transposed"] = True
    return found


def _variant(fields: Fields, where: str) -> VariantSpec:
    programs, blocks = fields.object("programs"), fields.object("blocks")
    known = {name: _program(name, programs.object(name), where) for name in programs.names()}
    found = {}
    for key in blocks.names():
        block = blocks.object(key)
        scalars = block.object("scalars")
        spec = BlockSpec(
            block.text("program"),
            {name: scalars.number(name, positive=False) for name in scalars.names()},
            block.text("extended") if "extended" in block.names() else "",
        )
        for program in (spec.program, *([spec.extended] if spec.extended else [])):
            if program not in known:
                raise BundleError(f"{where}: {key} runs {program!r}, which is unknown; run zimage-export engines again")
            if set(spec.scalars) != set(known[program].scalars):
                raise BundleError(
                    f"{where}: {key} does not have the scalars of {program!r}; run zimage-export engines again"
                )
        found[key] = spec
    return VariantSpec(known, found)


def _program(name: str, fields: Fields, where: str) -> ProgramSpec:
    kind = fields.text("kind")
    if kind not in list(BlockKind):
        raise BundleError(f"{where}: kind {kind!r} is unknown; run zimage-export engines again or upgrade zimage-rt")
    weights = _weights(fields.object("weights"), where, name)
    branches = _weights(fields.object("branches"), where, name) if "branches" in fields.names() else {}
    profile = fields.object("profile")
    shapes = {}
    for key in profile.names():
        rows = [_sizes(row, where, f"{name}: profile") for row in _list(profile, key)]
        if len(rows) != 3:
            raise BundleError(f"{where}: {name}: a profile is three shapes")
        shapes[key] = (rows[0], rows[1], rows[2])
    points = [_sizes(point, where, f"{name}: scratch") for point in _list(fields, "scratch")]
    if not points or any(len(point) != 2 for point in points) or points != sorted(points):
        raise BundleError(f"{where}: {name}: scratch must be pairs of positions and bytes, ascending")
    scalars = _list(fields, "scalars")
    if any(not isinstance(scalar, str) for scalar in scalars):
        raise BundleError(f"{where}: {name}: scalars must be names")
    map_dtype = fields.text("map_dtype")
    if map_dtype not in list(DType):
        raise BundleError(f"{where}: {name}: type {map_dtype!r} is unknown to this version; upgrade zimage-rt")
    return ProgramSpec(
        name,
        BlockKind(kind),
        checked_path(fields.text("path"), where),
        weights,
        tuple(scalars),
        DType(map_dtype),
        shapes,
        tuple((point[0], point[1]) for point in points),
        branches,
    )


def _weights(fields: Fields, where: str, program: str) -> dict[str, InputSpec]:
    return {key: _weight(fields.object(key), where, f"{program}: {key}") for key in fields.names()}


def _weight(fields: Fields, where: str, what: str) -> InputSpec:
    dtype, shape = fields.text("dtype"), _sizes(fields.raw("shape"), where, what)
    parts = _list(fields, "parts") if "parts" in fields.names() else []
    transposed = "transposed" in fields.names() and fields.raw("transposed") is True
    if dtype not in list(DType) or any(not isinstance(part, str) for part in parts):
        raise BundleError(f"{where}: {what} must have a known type, and names of tensors")
    return InputSpec(DType(dtype), shape, tuple(parts), transposed)


def _engine(entry: object, where: str) -> EngineSpec:
    fields = Fields(entry, where)
    variant, gpu = fields.text("variant"), fields.text("gpu")
    if variant not in list(Variant) or gpu not in list(GpuTarget):
        raise BundleError(f"{where}: engine for {gpu!r} is unknown to this version; upgrade zimage-rt")
    return EngineSpec(
        checked_path(fields.text("path"), where),
        fields.text("program"),
        Variant(variant),
        GpuTarget(gpu),
        fields.text("library"),
        fields.text("version"),
    )


def _list(fields: Fields, key: str) -> list[Any]:
    value = fields.raw(key)
    if not isinstance(value, list):
        raise fields.fail(key, "a list")
    return value


def _sizes(value: object, where: str, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise BundleError(f"{where}: {what} must be a list of sizes")
    return tuple(value)
