"""A bundle on the disk: opened, checked, and the paths of its files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..errors import BundleError
from ..mistaken_files import mistaken_file
from ..model.programs import Program
from .files import hash_file
from .manifest import MANIFEST_NAME, FileRecord, Manifest

_NEEDED_FOR = {Program.ENCODER: "to start from an image"}
"""The purpose of programs that only some requests need."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file that its manifest lists exists and has its size."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, repairs_programs: bool = False) -> Self:
        """Opens the bundle in a directory; with `repairs_programs`, one whose programs may be missing or damaged.

        Raises `BundleError` if the directory is not a bundle, if its schema is newer, if a path leads out of it, or if
        a file is missing or has another size. Hashes take longer: `verify` checks them.
        """
        root = Path(path)
        manifest_path = root / MANIFEST_NAME
        try:
            text = manifest_path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if not root.exists():
                raise BundleError(f"{root}: no such bundle") from None
            raise BundleError(f"{root}: not a bundle (it has no {MANIFEST_NAME}); zimage-export makes one") from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{manifest_path}: cannot be read: {error}") from None
        bundle = cls(root, Manifest.from_json(text, str(manifest_path)))
        programs = {record.path for of in bundle.manifest.programs.values() for record in of.values()}
        for name, record in bundle.manifest.files.items():
            if name not in programs:
                bundle._check_size(name, record.size, "export or download it again")
            elif not repairs_programs:
                bundle._check_size(name, record.size, f"`zimage-export programs {root}` writes it again")
        return bundle

    def _check_size(self, name: str, size: int, remedy: str) -> None:
        path = self.root / name
        try:
            found = path.stat().st_size if path.is_file() else None
        except OSError:
            found = None
        if found is None:
            raise BundleError(f"{path}: missing from the bundle; {remedy}")
        if found != size:
            if mistaken := mistaken_file(path):
                raise BundleError(f"{path}: {mistaken}")
            raise BundleError(f"{path}: {found} bytes instead of {size}; {remedy}")

    def file(self, name: str) -> Path:
        """The path of one of the manifest's files."""
        return self.root / name

    def program(self, program: Program, executor: str) -> Path:
        """The path of a program. Raises `BundleError` if the bundle has none for the executor."""
        record = self.manifest.record(program, executor)
        if record is None:
            needed = _NEEDED_FOR.get(program)
            purpose = f", which is needed {needed}" if needed else ""
            raise BundleError(
                f"{self.root}: has no {program} program for executor {executor!r}{purpose}; "
                "`zimage-export programs` adds what an older bundle lacks, or export the bundle again"
            )
        return self.file(record.path)

    def verify(self, progress: Callable[[int], object] | None = None) -> None:
        """Checks every file's hash. Raises `BundleError` that names the altered files."""
        check_hashes(self.root, self.manifest.files, progress)

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.size for record in self.manifest.files.values())


def check_hashes(root: Path, files: Mapping[str, FileRecord], progress: Callable[[int], object] | None = None) -> None:
    """Checks the hash of every file of a folder. Raises `BundleError` that names the altered ones."""
    altered = []
    for name, record in files.items():
        try:
            if hash_file(root / name, progress) != record.sha256:
                altered.append(name)
        except OSError as error:
            raise BundleError(f"{root / name}: cannot be read: {error.strerror}") from None
    if altered:
        raise BundleError(f"{root}: altered since it was written: {', '.join(altered)}; export or download it again")
