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

from .orders import MaskKind, Wanted

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112  # of EXIF
_TURNED = (5, 6, 7, 8)  # by a quarter
_WHITE = 128  # the lowest gray value that is nearer to white than to black
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
    """Width and height by the header, as the image is seen.

    Raises `RequestError` for what is no image or has more than `most` pixels.
    """
    image = _opened(data, what)
    if image.width * image.height > most:
        raise RequestError(
            f"{what}: {image.width}x{image.height} has more than the {most} pixels that this server reads"
        )
    try:
        # a PNG would be decoded for it
        turned = image.format != "PNG" and image.getexif().get(_ORIENTATION) in _TURNED
    except Exception as error:  # a damaged image may make the library raise anything
        raise RequestError(f"{what}: damaged: {error}") from None
    return (image.height, image.width) if turned else image.size


def sources(wanted: Wanted) -> tuple["Image | None", "Image | None", "Image | None"]:
    """The source image, the mask and the control image of a request, decoded. Raises `RequestError` for a damaged file.

    White areas of the mask are repainted. Transparent areas of the image are put on white; in OpenAI's way, they are
    the mask where there is no other.
    """
    control = None if wanted.control is None else _on(_loaded(wanted.control, "the control image"), "black")
    return *_source_and_mask(wanted), control


def _source_and_mask(wanted: Wanted) -> tuple["Image | None", "Image | None"]:
    if wanted.image is None:
        return None, None
    image, mask = _loaded(wanted.image, "the image"), None
    if wanted.mask is not None:
        mask = _mask(_loaded(wanted.mask, "the mask"), wanted.mask_kind)
    elif wanted.mask_kind is MaskKind.TRANSPARENT and image.has_transparency_data:
        own = _transparent(image)
        mask = own if own.getextrema()[1] >= _WHITE else None  # type: ignore[operator]  # of one channel, numbers
    return _on(image, "white"), mask


def _mask(image: "Image", kind: MaskKind) -> "Image":
    """OpenAI's masks repaint what is transparent; one without transparency is read as white on black.

    In the other kinds, transparent areas are kept.
    """
    from PIL import ImageOps

    if kind is MaskKind.TRANSPARENT and image.has_transparency_data:
        return _transparent(image)
    if kind is MaskKind.BLACK:
        return ImageOps.invert(_on(image, "white").convert("L"))
    return _on(image, "black")


def _transparent(image: "Image") -> "Image":
    """White where an image is transparent."""
    from PIL import ImageOps

    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def _on(image: "Image", background: str) -> "Image":
    """An image without transparency; one that has none stays as it is."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


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
