"""A ControlNet's folder: weights, programs for every executor, and a manifest of a kind of its own.

It lies beside bundles and goes with any bundle of the model that it was trained for, in any precision. Opening checks
what opening a bundle checks.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ..checked_json import Fields
from ..errors import BundleError, ConfigError
from ..mistaken_files import mistaken_file, mistaken_for
from ..model.control import ControlConfig
from ..model.programs import CONTROL_PROGRAMS, Program
from .bundle import check_hashes
from .files import atomic_write
from .manifest import (
    CONTROL_FORMAT,
    FORMAT,
    MANIFEST_NAME,
    FileRecord,
    Origin,
    ProgramRecord,
    checked_path,
    file_record,
    plain_object,
    program_records,
)
from .precision import Precision

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ControlManifest:
    """Everything that a ControlNet's ``manifest.json`` says, checked."""

    precision: Precision
    source: Origin  # the file that it was made from
    exporter: str
    config: ControlConfig
    programs: Mapping[Program, Mapping[str, ProgramRecord]]
    weights: str  # path of the weights
    files: Mapping[str, FileRecord]
    folds: Mapping[str, Any] = field(default_factory=dict)  # powers of two divided out of weights, by block
    self_check: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None  # distances to the file in float32; None until measured

    @property
    def name(self) -> str:
        """What to call it in an image's metadata."""
        return f"{self.source.name}-{self.precision.value}"

    @property
    def fingerprint(self) -> str:
        """What an image records of it: a hash of all that decides its hints, and of nothing else."""
        decisive = {
            "weights": self.files[self.weights].sha256,
            "config": asdict(self.config),
            "precision": self.precision.value,
            "folds": self.folds,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def record(self, program: Program, executor: str) -> ProgramRecord | None:
        """A program as an executor runs it; None where there is none."""
        return self.programs.get(program, {}).get(executor)

    def missing(self, executor: str, host: str) -> tuple[Program, ...]:
        """The programs that an executor lacks. `host` is whose programs run on the processor."""
        return tuple(
            program
            for program in self.config.programs
            if self.record(program, host if program is Program.CONTROL_MODULATION else executor) is None
        )

    def to_json(self) -> str:
        """The file's text."""
        document = {
            "format": CONTROL_FORMAT,
            "schema_version": SCHEMA_VERSION,
            "precision": self.precision.value,
            "source": vars(self.source),
            "exporter": self.exporter,
            "config": asdict(self.config),
            "programs": {
                program.value: {executor: vars(record) for executor, record in records.items()}
                for program, records in self.programs.items()
            },
            "weights": self.weights,
            "files": {path: vars(record) for path, record in self.files.items()},
            "folds": self.folds,
            "self_check": self.self_check,
            "parity": self.parity,
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Self:
        """Raises `BundleError` for anything that this version cannot use."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            problem = mistaken_for(text) or "not valid JSON; the ControlNet is damaged, export or download it again"
            raise BundleError(f"{where}: {problem}") from None
        try:
            return cls._read(Fields(data, where))
        except ConfigError as error:
            raise BundleError(str(error)) from None

    @classmethod
    def _read(cls, fields: Fields) -> Self:
        where, kind = fields.where, fields.raw("format")
        if kind == FORMAT:
            raise BundleError(f"{where}: this is a bundle, not a ControlNet; give it with -m")
        if kind != CONTROL_FORMAT:
            raise BundleError(
                f"{where}: this is not the manifest of a ControlNet; `zimage-export controlnet` makes one"
            )
        version = fields.integer("schema_version")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{where}: written for schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade zimage-rt"
            )
        precision = fields.text("precision")
        if precision not in list(Precision):
            raise BundleError(f"{where}: precision {precision!r} is unknown to this version; upgrade zimage-rt")
        listed_files = fields.object("files")
        files = {checked_path(path, where): file_record(listed_files.object(path)) for path in listed_files.names()}

        def listed(path: str) -> str:
            if path not in files:
                raise BundleError(f"{where}: {path!r} is used but not listed under files")
            return path

        programs, source = fields.object("programs"), fields.object("source")
        return cls(
            precision=Precision(precision),
            source=Origin(source.text("name"), source.optional_text("revision")),
            exporter=fields.text("exporter"),
            config=ControlConfig.read(fields.object("config")),
            programs={
                program: program_records(programs.object(program.value), listed)
                for program in CONTROL_PROGRAMS
                if program.value in programs
            },
            weights=listed(fields.text("weights")),
            files=files,
            folds=plain_object(fields, "folds") or {},
            self_check=plain_object(fields, "self_check") or {},
            parity=plain_object(fields, "parity"),
        )


@dataclass(frozen=True)
class ControlNet:
    """An opened ControlNet: every file that its manifest lists exists and has its size."""

    root: Path
    manifest: ControlManifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens the folder of a ControlNet. Raises `BundleError` for what is none, or is damaged."""
        root = Path(path)
        manifest_path = root / MANIFEST_NAME
        try:
            text = manifest_path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if root.is_file():
                raise BundleError(
                    f"{root}: is a file; `zimage-export controlnet {root} OUT` makes the folder that is needed"
                ) from None
            what = f"not a ControlNet (it has no {MANIFEST_NAME}); `zimage-export controlnet` makes one"
            raise BundleError(f"{root}: {what if root.exists() else 'no such ControlNet'}") from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{manifest_path}: cannot be read: {error}") from None
        opened = cls(root, ControlManifest.from_json(text, str(manifest_path)))
        for name, record in opened.manifest.files.items():
            opened._check_size(name, record.size)
        return opened

    def _check_size(self, name: str, size: int) -> None:
        path = self.root / name
        try:
            found = path.stat().st_size if path.is_file() else None
        except OSError:
            found = None
        if found is None:
            raise BundleError(f"{path}: missing from the ControlNet; export or download it again")
        if found != size:
            problem = mistaken_file(path) or f"{found} bytes instead of {size}; export or download the ControlNet again"
            raise BundleError(f"{path}: {problem}")

    def program(self, program: Program, executor: str) -> Path:
        """The path of a program. Raises `BundleError` if there is none for the executor."""
        record = self.manifest.record(program, executor)
        if record is None:
            raise BundleError(f"{self.root}: has no {program} program for {executor!r}; export the ControlNet again")
        return self.root / record.path

    def verify(self, progress: Callable[[int], object] | None = None) -> None:
        """Checks every file's hash. Raises `BundleError` that names the altered files."""
        check_hashes(self.root, self.manifest.files, progress)

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.size for record in self.manifest.files.values())

    def with_manifest(self, **changes: Any) -> Self:
        """The same folder, with other values in its manifest."""
        return replace(self, manifest=replace(self.manifest, **changes))


def is_controlnet(root: Path) -> bool:
    """Whether a folder's manifest says that it is a ControlNet's, whatever else is wrong with it."""
    try:
        data = json.loads((root / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == CONTROL_FORMAT


def write_control_manifest(root: Path, manifest: ControlManifest) -> None:
    """Replaces a ControlNet's manifest atomically."""
    with atomic_write(root / MANIFEST_NAME) as file:
        file.write(manifest.to_json().encode())
