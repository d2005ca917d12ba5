"""The formats that images are written in, and what a file is that turns out to be no image."""

from enum import StrEnum
from pathlib import Path

from ..errors import RequestError


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

_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype html", b"<html")
_BYTES_READ = 1024


def image_format(path: Path) -> ImageFormat:
    """The format that a path's extension stands for. Raises `RequestError` for an unknown one."""
    found = _BY_SUFFIX.get(path.suffix.lower())
    if found is None:
        known = ", ".join(_BY_SUFFIX)
        raise RequestError(f"{path}: {path.suffix or 'no extension'} is not an image format; use one of {known}")
    return found


def not_an_image(path: Path, readable: str) -> RequestError:
    """The error for a file that cannot be read as an image. `readable` lists the formats that can be, for people.

    Two kinds of files are often saved in an image's place and are named: Git LFS pointers and web pages.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_BYTES_READ)
    except OSError:
        start = b""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(_GIT_LFS):
        return RequestError(f"{path}: is a Git LFS pointer instead of the image; fetch the image with `git lfs pull`")
    if start.startswith(b"<") and any(tag in start for tag in _HTML):  # XHTML begins with an XML declaration
        return RequestError(f"{path}: is an HTML page instead of an image; download the image itself")
    return RequestError(f"{path}: not an image that can be read; use {readable}")
