"""Images that come with requests: from base64 to bytes, checked by their header, and decoded in the engine alone.

A few kilobytes of file can claim gigabytes of pixels, so the size that the header states is checked before decoding.
"""

import base64
import binascii
import io
import re
import warnings
from typing import TYPE_CHECKING

from zimage_runtime.errors import RequestError

from .orders import MaskKind

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:[\w.+/-]{0,100}(?:;[\w=.+-]{1,100}){0,4},", re.ASCII)


def from_base64(text: str, what: str) -> bytes:
    """The bytes of base64, plain or in a data URL. Raises `RequestError`."""
    match = _DATA_URL.match(text)
    if match is None and re.match(r"[a-z]+:", text[:16]):
        raise RequestError(f"{what}: give the image itself, as base64 or a data URL; addresses are not fetched")
    if match is not None and not match[0].endswith(";base64,"):
        raise RequestError(f"{what}: a data URL must be in base64")
    try:
        data = base64.b64decode("".join(text[match.end() if match else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{what}: is not valid base64") from None
    if not data:
        raise RequestError(f"{what}: is empty")
    return data


def image_size(data: bytes, what: str, most: int) -> tuple[int, int]:
    """Width and height by the header. Raises `RequestError` for what is no image or has more than `most` pixels."""
    image = _opened(data, what)
    if image.width * image.height > most:
        raise RequestError(
            f"{what}: {image.width}x{image.height} has more than the {most} pixels that this server reads"
        )
    return image.size


def decoded(data: bytes, what: str) -> "Image":
    """An image on white where it is transparent. Raises `RequestError` for a damaged one."""
    from PIL import Image

    image = _loaded(data, what)
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def decoded_mask(data: bytes, kind: MaskKind, what: str) -> "Image":
    """A mask whose white areas are repainted.

    OpenAI's masks repaint what is transparent; one without transparency is read as white on black. In the other kinds,
    transparent areas are kept.
    """
    from PIL import Image, ImageOps

    image = _loaded(data, what)
    if kind is MaskKind.TRANSPARENT and image.has_transparency_data:
        return ImageOps.invert(image.convert("RGBA").getchannel("A"))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        kept = "white" if kind is MaskKind.BLACK else "black"
        image = Image.alpha_composite(Image.new("RGBA", layer.size, kept), layer)
    return ImageOps.invert(image.convert("L")) if kind is MaskKind.BLACK else image


def _opened(data: bytes, what: str) -> "Image":
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(action="ignore"):
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise RequestError(f"{what}: not an image that can be read; use PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise RequestError(f"{what}: has too many pixels; make it smaller first") from None
    except Exception as error:  # a damaged image may make the library raise anything
        raise RequestError(f"{what}: damaged: {error}") from None


def _loaded(data: bytes, what: str) -> "Image":
    from PIL import ImageOps

    image = _opened(data, what)
    if image.mode.startswith(("I", "F")):
        raise RequestError(f"{what}: has more than 8 bits per channel; save it with 8")
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:
        raise RequestError(f"{what}: damaged or cut off ({error})") from None
    found = image if upright is None else upright
    return found if found.mode in ("L", "RGB", "RGBA", "LA", "P", "1", "PA") else found.convert("RGB")
