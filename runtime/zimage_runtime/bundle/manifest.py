"""``manifest.json``: what a bundle contains, where it came from, and how far it is from its checkpoint.

What decides the image (weights, embeddings, tokenizer, configuration) is required. All that is made from it (programs,
engines) or that adds to it (rebalancing factors, measurements) may be missing or unknown: a bundle that was made before
a program existed opens, and so does one of a later version of the same schema.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..checked_json import Fields, from_document, is_unicode, to_document
from ..errors import BundleError, ConfigError
from ..mistaken_files import mistaken_for
from ..model.config import PARTS, ModelConfig
from ..model.preview_map import PreviewMap
from ..model.programs import COMPONENTS, Program
from .files import atomic_write
from .precision import Precision as Precision

FORMAT = "zimage-bundle"
CONTROL_FORMAT = "zimage-controlnet"
"""Of a ControlNet's folder: see `controlnet`."""
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

CPU = "cpu"
CUDA = "cuda"
TENSORRT = "tensorrt"
WEBGPU = "webgpu"

CUDA_WEIGHT_ONLY = "cuda-weight-only"
"""Not an executor: the `cuda` executor's other program for an int8 bundle's denoiser, on the same bytes."""

CUDA_BLOCKS = "cuda-blocks"
"""Not an executor either: on the same bytes too, brought into blocks of 8 bits when the program is loaded."""

WEBGPU_FUSED = "webgpu-fused"
"""Not an executor: the `webgpu` executor's other programs, whose attention is one fused operator; it is right on some
adapters only."""

_EXTENDED = "-extended"


def extended(name: str) -> str:
    """The name of the programs that take LoRA, beside those of a name: `cpu-extended` extends `cpu`."""
    return name + _EXTENDED


def _is_executor(name: str) -> bool:
    """Whether programs of this name are an executor's first, and no variant."""
    return name not in (CUDA_WEIGHT_ONLY, CUDA_BLOCKS, WEBGPU_FUSED) and not name.endswith(_EXTENDED)


ENGINES_FOLDER = "engines/"

REQUIRED = (Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER, Program.DECODER)
"""The programs that an executor cannot do without. Modulation always runs on the CPU; all others are optional."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle."""

    size: int  # bytes
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class ProgramRecord:
    """A program as one kind of executor runs it."""

    path: str  # of the ONNX file, inside the bundle
    weight_bytes: int  # of the weights that it uses


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a bundle was made from."""

    name: str  # the directory's name or the Hub id; never a path
    revision: str | None = None


@dataclass(frozen=True)
class Defaults:
    """What an image gets when the user does not say."""

    width: int  # pixels
    height: int
    steps: int
    cfg_scale: float = 1.0  # of classifier-free guidance, as A1111 counts it: 1 is none


@dataclass(frozen=True)
class Manifest:
    """Everything that ``manifest.json`` says, checked."""

    precision: Precision
    source: Origin
    exporter: str  # name and version of the program that wrote the bundle
    config: ModelConfig
    defaults: Defaults
    programs: Mapping[Program, Mapping[str, ProgramRecord]]  # those that are there: by program, then by executor
    weights: Mapping[str, str]  # path of each component's weights
    embeddings: str  # path of the token embeddings
    tokenizer: str  # path of tokenizer.json
    files: Mapping[str, FileRecord]  # every file but the manifest, by path with forward slashes
    self_check: Mapping[str, Any] = field(default_factory=dict)  # each program's output on a fixed input, summarized
    folds: Mapping[str, Any] = field(default_factory=dict)  # powers of two divided out of weights, by component
    rotations: Mapping[str, int] = field(default_factory=dict)  # `component/weight` → inputs that programs rotate
    parity: Mapping[str, Any] | None = None  # distances to the checkpoint; None until measured
    engines: str | None = None  # path of the catalog of block programs and engines for TensorRT
    rebalancing: Mapping[str, str] = field(default_factory=dict)  # path of a component's factors, where it has some
    preview: PreviewMap | None = None  # latents to colours; bundles that were made before have none
    variant: str | None = None  # of the model: turbo or base; bundles that were made before do not say
    earlier_fingerprints: tuple[str, ...] = ()  # that images may record which these weights generated: see `matches`

    @property
    def name(self) -> str:
        """What to call the model in an image's metadata."""
        return f"{self.source.name.rpartition('/')[2]}-{self.precision.value}"

    @property
    def fingerprint(self) -> str:
        """What an image records of its bundle: a hash of all that decides the image.

        That is the hashes of the weights, the embeddings and the tokenizer, the configuration, the precision, and the
        folds and rotations, which programs are built with. Programs, engines, rebalancing factors, measurements and the
        names of files are left out, so that they can be renewed without making the bundle another one.
        """
        decisive: dict[str, object] = {
            "weights": {component: self.files[path].sha256 for component, path in self.weights.items()},
            "embeddings": self.files[self.embeddings].sha256,
            "tokenizer": self.files[self.tokenizer].sha256,
            "config": self.config.to_json(),
            "precision": self.precision.value,
            "folds": self.folds,
        }
        if self.rotations:
            decisive["rotations"] = dict(self.rotations)
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def files_fingerprint(self) -> str:
        """A hash of all files' hashes but the engines': what images recorded before there was `fingerprint`."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.files if not path.startswith(ENGINES_FOLDER)):
            digest.update(f"{path} {self.files[path].sha256}\n".encode())
        return digest.hexdigest()

    def matches(self, fingerprint: str) -> bool:
        """Whether an image that records `fingerprint` was generated with these weights.

        An image may record one of two kinds. `fingerprint` is compared as it is. `files_fingerprint`, the older kind,
        also depends on the programs: it can be computed as long as they are the ones that the image was generated
        with, and `with_programs` writes it down before it replaces them.
        """
        return fingerprint in (self.fingerprint, self.files_fingerprint, *self.earlier_fingerprints)

    def with_programs(
        self,
        programs: Mapping[Program, Mapping[str, ProgramRecord]],
        files: Mapping[str, FileRecord],
    ) -> Self:
        """The manifest with other programs and files, which images of the programs before it still match.

        Anyone who adds or replaces programs of a bundle goes through here. Raises `ValueError` for other weights.
        """
        earlier = tuple(dict.fromkeys((*self.earlier_fingerprints, self.files_fingerprint)))
        renewed = dataclasses.replace(self, programs=programs, files=files, earlier_fingerprints=earlier)
        if renewed.fingerprint != self.fingerprint:
            raise ValueError("only programs may be replaced: these files contain other weights")
        return renewed

    def record(self, program: Program, executor: str) -> ProgramRecord | None:
        """A program as an executor runs it; None where the bundle has none."""
        return self.programs.get(program, {}).get(executor)

    def missing(self, executor: str) -> tuple[Program, ...]:
        """The required programs that an executor lacks."""
        lacking = [program for program in REQUIRED if self.record(program, executor) is None]
        return tuple(lacking + [Program.MODULATION] * (self.record(Program.MODULATION, CPU) is None))

    @property
    def executors(self) -> set[str]:
        """The executors that have every required program."""
        if self.record(Program.MODULATION, CPU) is None:
            return set()
        complete = set.intersection(*(set(self.programs.get(program, {})) for program in REQUIRED))
        return set(filter(_is_executor, complete))

    def to_json(self) -> str:
        """The file's text."""
        document = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "precision": self.precision.value,
            "source": {"name": self.source.name, "revision": self.source.revision},
            "exporter": self.exporter,
            "config": self.config.to_json(),
            "defaults": vars(self.defaults),
            "programs": {
                program.value: {executor: vars(record) for executor, record in records.items()}
                for program, records in self.programs.items()
            },
            "weights": dict(self.weights),
            "embeddings": self.embeddings,
            "tokenizer": self.tokenizer,
            "files": {path: vars(record) for path, record in self.files.items()},
            "folds": self.folds,
            "rotations": dict(self.rotations),
            "self_check": self.self_check,
            "parity": self.parity,
            "engines": self.engines,
            "rebalancing": dict(self.rebalancing),
            "preview": to_document(self.preview),
            "variant": self.variant,
            "earlier_fingerprints": list(self.earlier_fingerprints),
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Raises `BundleError` for anything that this version cannot use."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            if mistaken := mistaken_for(text.encode(errors="replace") if isinstance(text, str) else text):
                raise BundleError(f"{where}: {mistaken}") from None
            raise BundleError(f"{where}: not valid JSON; the bundle is damaged, export or download it again") from None
        try:
            return cls._read(Fields(data, where))
        except ConfigError as error:
            raise BundleError(str(error)) from None

    @classmethod
    def _read(cls, fields: Fields) -> Self:
        where = fields.where
        if fields.raw("format") == CONTROL_FORMAT:
            raise BundleError(f"{where}: this is a ControlNet, which goes with a bundle; give it with --controlnet")
        if fields.raw("format") != FORMAT:
            raise BundleError(f"{where}: this is not the manifest of a zimage bundle")
        version = fields.integer("schema_version")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{where}: written for schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade zimage-rt"
            )
        precision = fields.text("precision")
        if precision not in list(Precision):
            raise BundleError(f"{where}: precision {precision!r} is unknown to this version; upgrade zimage-rt")
        files = {
            checked_path(path, where): file_record(fields.object("files").object(path))
            for path in fields.object("files").names()
        }

        def listed(path: str) -> str:
            if path not in files:
                raise BundleError(f"{where}: {path!r} is used but not listed under files")
            return path

        config = fields.object("config")
        weights, programs = fields.object("weights"), fields.object("programs")
        source, defaults = fields.object("source"), fields.object("defaults")
        return cls(
            precision=Precision(precision),
            source=Origin(source.text("name"), source.optional_text("revision")),
            exporter=fields.text("exporter"),
            config=ModelConfig.read(
                {part: config.raw(part) for part in PARTS},
                {part: f"{where}: config: {part}" for part in PARTS},
            ),
            defaults=_defaults(defaults),
            programs={
                Program(name): records
                for name in programs.names()
                if name in list(Program)  # others are for a later version
                if (records := program_records(programs.object(name), listed))
            },
            weights={component: listed(weights.text(component)) for component in COMPONENTS},
            embeddings=listed(fields.text("embeddings")),
            tokenizer=listed(fields.text("tokenizer")),
            files=files,
            folds=plain_object(fields, "folds") or {},
            rotations=_rotations(fields),
            self_check=plain_object(fields, "self_check") or {},
            parity=plain_object(fields, "parity"),
            engines=listed(fields.text("engines")) if "engines" in fields else None,
            rebalancing=_rebalancing(fields, listed),
            preview=_preview(fields),
            variant=fields.optional_text("variant"),
            earlier_fingerprints=_fingerprints(fields),
        )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replaces a bundle's manifest atomically."""
    with atomic_write(root / MANIFEST_NAME) as file:
        file.write(manifest.to_json().encode())


def checked_path(path: str, where: str) -> str:
    """A path that stays inside the bundle on every system. Raises `BundleError` for any other."""
    parts = path.split("/")
    outside = any(part in ("", ".", "..") for part in parts) or any(character in path for character in "\\:\0")
    if outside or not is_unicode(path):
        raise BundleError(f"{where}: unsafe path {path!r}: paths must be relative, inside the bundle, without '..'")
    return path


def _defaults(fields: Fields) -> Defaults:
    scale = fields.number("cfg_scale") if "cfg_scale" in fields else 1.0
    if scale < 1:
        raise fields.fail("cfg_scale", "at least 1, which is no guidance")
    return Defaults(fields.integer("width"), fields.integer("height"), fields.integer("steps"), scale)


def file_record(fields: Fields) -> FileRecord:
    """Size and hash of a file."""
    sha256 = fields.text("sha256")
    if not _SHA256.fullmatch(sha256):
        raise fields.fail("sha256", "64 hexadecimal digits")
    return FileRecord(fields.integer("size", minimum=0), sha256)


def program_records(fields: Fields, listed: Callable[[str], str]) -> dict[str, ProgramRecord]:
    """A program's files by executor. `listed` checks that a path is among the files."""
    records = {}
    for executor in fields.names():
        record = fields.object(executor)
        records[executor] = ProgramRecord(listed(record.text("path")), record.integer("weight_bytes", minimum=0))
    return records


def _rebalancing(fields: Fields, listed: Callable[[str], str]) -> dict[str, str]:
    if "rebalancing" not in fields:
        return {}
    paths = fields.object("rebalancing")
    return {component: listed(paths.text(component)) for component in COMPONENTS if component in paths}


def _rotations(fields: Fields) -> dict[str, int]:
    if "rotations" not in fields:
        return {}
    sizes = fields.object("rotations")
    return {name: sizes.integer(name) for name in sizes.names()}


def _fingerprints(fields: Fields) -> tuple[str, ...]:
    if "earlier_fingerprints" not in fields:
        return ()
    values = fields.raw("earlier_fingerprints")
    if not isinstance(values, list) or not all(isinstance(v, str) and _SHA256.fullmatch(v) for v in values):
        raise fields.fail("earlier_fingerprints", "a list of fingerprints, 64 hexadecimal digits each")
    return tuple(values)


def _preview(fields: Fields) -> PreviewMap | None:
    if "preview" not in fields:
        return None
    return from_document(PreviewMap, fields.raw("preview"), f"{fields.where}: preview")


def plain_object(fields: Fields, key: str) -> dict[str, Any] | None:
    """A JSON object as it is; None where there is none."""
    if key not in fields:
        return None
    value = fields.raw(key)
    if not isinstance(value, dict) or not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise fields.fail(key, "a JSON object or null")
    return value
