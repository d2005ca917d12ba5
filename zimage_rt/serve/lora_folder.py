"""The LoRA that requests may name: the files of one folder, and no path from a request."""

from pathlib import Path

from .refusals import InvalidError

_SUFFIX = ".safetensors"


class LoraFolder:
    """A folder, read again for each request, so that files can come and go. None has no files."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def files(self) -> dict[str, Path]:
        """Files by name: their path in the folder without the extension, with forward slashes."""
        if self.folder is None:
            return {}
        found = sorted(path for path in self.folder.rglob(f"*{_SUFFIX}") if path.is_file())
        return {path.relative_to(self.folder).as_posix().removesuffix(_SUFFIX): path for path in found}

    def path(self, name: str) -> Path:
        """The file of a name, which may leave out its folders where that is clear. Raises `InvalidError`."""
        files = self.files()
        wanted = name.removesuffix(_SUFFIX)
        if wanted in files:
            return files[wanted]
        same = [path for known, path in files.items() if known.rpartition("/")[2] == wanted]
        if len(same) == 1:
            return same[0]
        if same:
            raise InvalidError(f"several LoRA are called {name!r}; name the folder, too")
        if self.folder is None:
            raise InvalidError(f"there is no LoRA {name!r}: the server was started without --lora-dir")
        known = ", ".join(list(files)[:20]) or "none"
        raise InvalidError(f"there is no LoRA {name!r} on this server; there are: {known}")

    def resolved(self, named: list[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
        """Paths and weights of names and weights. Raises `InvalidError`."""
        return tuple((str(self.path(name)), weight) for name, weight in named)
