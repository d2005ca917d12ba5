"""Where images are written: names that are free, folders that exist, files that are whole or absent."""

import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from zimage_runtime.bundle.files import atomic_write
from zimage_runtime.errors import RequestError


class ImageFormat(StrEnum):
    """The formats that images are written in, by Pillow's names."""

    PNG = "PNG"
    JPEG = "JPEG"
    WEBP = "WEBP"


_BY_SUFFIX = {
    ".png": ImageFormat.PNG,
    ".jpg": ImageFormat.JPEG,
    ".jpeg": ImageFormat.JPEG,
    ".webp": ImageFormat.WEBP,
}


def image_format(path: Path) -> ImageFormat:
    """The format that a path's extension stands for. Raises `RequestError` for any other."""
    found = _BY_SUFFIX.get(path.suffix.lower())
    if found is None:
        known = ", ".join(_BY_SUFFIX)
        raise RequestError(f"{path}: {path.suffix or 'no extension'} is no image format; use one of {known}")
    return found


def check_output(path: Path | None) -> None:
    """Fails before any work is done; None stands for a free name in the current folder.

    Raises `RequestError` for an extension or a folder that cannot serve.
    """
    if path is not None:
        image_format(path)
        if not path.parent.is_dir():
            raise RequestError(f"{path}: the folder {path.parent} does not exist; make it first")
        if path.is_dir():
            raise RequestError(f"{path}: is a folder; name a file in it")
    folder = path.parent if path is not None else Path()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"{folder.absolute()}: images cannot be written here; name another folder with -o")


def _candidates(output: Path | None, seed: int, count: int) -> Iterator[tuple[Path, bool]]:
    """Names to try, each with whether the user named it and so may lose what is there."""
    if output is not None and count == 1:
        yield output, True
        return
    base = Path(f"zimage-{seed}.png") if output is None else output.with_stem(f"{output.stem}-{seed}")
    yield base, False
    number = 2
    while True:
        yield base.with_stem(f"{base.stem}-{number}"), False
        number += 1


def write_image(data: bytes, output: Path | None, seed: int, count: int) -> Path:
    """Writes an encoded image and returns its path.

    Only a file that `output` names itself is ever replaced. Without `output` the name is zimage-SEED.png; with
    several images, -SEED is added to its stem; a name that is taken gets -2, -3, ….
    """
    for path, named in _candidates(output, seed, count):
        try:
            with atomic_write(path, overwrite=named) as file:
                file.write(data)
        except FileExistsError:
            continue
        except OSError as error:  # which names the temporary file, or none
            raise OSError(error.errno, error.strerror, str(path)) from None
        return path
    raise AssertionError("candidates never end")
