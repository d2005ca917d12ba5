"""Where images are written: names, folders that exist, files that are complete or absent.

The command writes each image as soon as it is decoded and replaces only a file that the user named (`write_image`).
The Python API saves images that it holds, by default over files of the same name (`save_images`).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.files import atomic_write
from ..errors import RequestError
from .formats import image_format
from .metadata import ImageInfo

if TYPE_CHECKING:
    from PIL.Image import Image


def check_output(path: Path | None) -> None:
    """Fails before any work is done; None stands for a free name in the current folder.

    Raises `RequestError` for an extension or a folder that cannot serve.
    """
    if path is not None:
        _check_file(path)
    folder = path.parent if path is not None else Path()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"{folder.absolute()}: images cannot be written here; choose another folder")


def write_image(data: bytes, output: Path | None, seed: int, count: int) -> Path:
    """Writes an encoded image and returns its path.

    Only a file that `output` names itself is ever replaced. Without `output` the name is zimage-SEED.png; with
    several images, -SEED is added to its stem; a name that is taken gets -2, -3, ….
    """
    if output is not None and count == 1:
        return _write(data, output, overwrite=True)
    named = Path(f"zimage-{seed}.png") if output is None else output.with_stem(f"{output.stem}-{seed}")
    return _write(data, named, overwrite=False)


def save_images(
    images: Sequence["Image"],
    infos: Sequence[ImageInfo],
    path: str | os.PathLike[str],
    *,
    metadata: bool = True,
    overwrite: bool = True,
) -> list[Path]:
    """Saves images with the metadata that `--replay` reads, and returns their paths.

    `path` is a file name, whose extension decides the format (PNG, JPEG or WebP): one image is saved under that
    name; with several, -SEED is added to its stem. Or `path` is a folder, either an existing one or a name that ends
    in a separator, which is then created; the files in it are zimage-SEED.png. Without `metadata`, nothing but pixels
    is saved. Without `overwrite`, a name that is taken gets -2, -3, …. Images are encoded before the first is written,
    and each file appears only when it is complete.

    Raises `RequestError` for an extension or a folder that cannot serve, or a prompt that is too long for the format's
    metadata, and `OSError` if a file cannot be written.
    """
    from .image_files import encode_image

    name = _file_name(path)
    target = Path(name)
    folder = target.is_dir() or name.endswith(_SEPARATORS)
    if folder:
        names = [target / f"zimage-{info.seed}.png" for info in infos]
    elif len(images) == 1:
        names = [target]
    else:
        names = [target.with_stem(f"{target.stem}-{info.seed}") for info in infos]
    if folder:
        _make_folder(target)
    else:
        _check_file(target)
    encoded = [
        encode_image(image, image_format(file), info if metadata else None)
        for image, info, file in zip(images, infos, names, strict=True)
    ]
    saved: list[Path] = []
    for data, file in zip(encoded, names, strict=True):
        # two images may have one seed, and the second must not replace the first
        saved.append(_write(data, file, overwrite=overwrite and file not in saved))
    return saved


def save_image(
    image: "Image",
    info: ImageInfo,
    path: str | os.PathLike[str],
    *,
    metadata: bool = True,
    overwrite: bool = True,
) -> Path:
    """Saves one image, as `save_images` does, and returns its path."""
    (saved,) = save_images([image], [info], path, metadata=metadata, overwrite=overwrite)
    return saved


def _file_name(path: str | os.PathLike[str]) -> str:
    """A path as text, which a file system can hold."""
    name = os.fspath(path)
    if not isinstance(name, str):
        raise RequestError(f"{name!r}: a path must be text")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise RequestError(f"{name!r}: not a valid file name") from None
    if "\0" in name:
        raise RequestError(f"{name!r}: not a valid file name")
    return name


_SEPARATORS = tuple(separator for separator in (os.sep, os.altsep) if separator)


def _check_file(path: Path) -> None:
    image_format(path)
    if not path.parent.is_dir():
        raise RequestError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise RequestError(f"{path}: is a folder; name a file in it")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{path}: the folder cannot be created: {error.strerror}") from None


def _candidates(path: Path) -> Iterator[Path]:
    """A name and those to try where it is taken."""
    yield path
    number = 2
    while True:
        yield path.with_stem(f"{path.stem}-{number}")
        number += 1


def _write(data: bytes, path: Path, *, overwrite: bool) -> Path:
    for candidate in _candidates(path):
        try:
            with atomic_write(candidate, overwrite=overwrite) as file:
                file.write(data)
        except FileExistsError:
            continue
        except OSError as error:  # which names the temporary file, or none
            raise OSError(error.errno, error.strerror, str(candidate)) from None
        return candidate
    raise AssertionError("candidates never end")
