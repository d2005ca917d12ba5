"""The image that image-to-image starts from and the mask of inpainting: read, checked, turned upright, resized.

An image is [1, 3, height, width] in -1 to 1 at the size that is generated, a mask [1, 1, height / 8, width / 8] of the
latents, 1 where the image is painted anew and 0 where it is kept. Both are resized as diffusers resizes them
(Lanczos; the mask is made of zeros and ones at the image's size, then read at every eighth pixel).
Source: ``VaeImageProcessor`` and ``prepare_mask_latents`` in diffusers.
"""

import hashlib
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np

from ..arrays import FloatArray
from ..errors import RequestError
from ..model.config import PATCH_SIZE, VaeConfig

if TYPE_CHECKING:
    from PIL.Image import Image

ImageInput = Union[str, os.PathLike[str], "Image"]
"""An image file, or an image that Pillow has opened."""

MAX_PIXELS = 100_000_000
"""More than any camera's, less than what fills a memory: a few kilobytes of file can claim far more."""

_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]
_MASK_MODES = ("1", "L", "P", "RGB")  # resized as they are, then made gray, as diffusers does


@dataclass(frozen=True)
class GivenImage:
    """An image as it was given, upright; and its mask."""

    image: "Image"  # RGB
    mask: "Image | None"  # one of `_MASK_MODES`
    image_name: str  # for messages
    mask_name: str = ""

    def own_size(self, config: VaeConfig) -> tuple[int, int]:
        """Width and height, each cut to a multiple of 16. Raises `RequestError` where nothing is left."""
        multiple = config.scale * PATCH_SIZE
        width, height = (side - side % multiple for side in self.image.size)
        if not width or not height:
            raise RequestError(
                f"{self.image_name}: {_size(self.image)} is smaller than {multiple}x{multiple}; choose a size"
            )
        return width, height

    def resized(self, width: int, height: int, config: VaeConfig) -> "SourceImage":
        """What the pipeline starts from, for an image of `width` x `height`. Raises `RequestError`."""
        from PIL.Image import Resampling

        image = self.image.resize((width, height), Resampling.LANCZOS)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / np.float32(255)
        mask = None
        if self.mask is not None:
            if self.mask.size not in (self.image.size, (width, height)):
                raise RequestError(
                    f"{self.mask_name}: is {_size(self.mask)}, the image {_size(self.image)}; "
                    "a mask must have the image's size"
                )
            gray = self.mask.resize((width, height), Resampling.LANCZOS).convert("L")
            unit = np.asarray(gray, np.float32) / np.float32(255)
            mask = (unit[:: config.scale, :: config.scale] >= 0.5).astype(np.float32)[None, None]
            if not mask.any():
                raise RequestError(f"{self.mask_name}: nothing is white, so nothing would be painted")
        return SourceImage(
            pixels=np.float32(2) * pixels - np.float32(1),
            mask=mask,
            image_hash=_hash(self.image),
            mask_hash=_hash(self.mask) if self.mask else None,
        )


@dataclass(frozen=True)
class SourceImage:
    """What an image is generated from, besides the prompt."""

    pixels: FloatArray  # [1, 3, height, width], -1 to 1
    mask: FloatArray | None  # [1, 1, height / 8, width / 8]: 1 is painted anew, 0 is kept
    image_hash: str  # SHA-256 of the image's pixels as they were given
    mask_hash: str | None


def open_given(image: ImageInput, mask: ImageInput | None) -> GivenImage:
    """Reads an image, and a mask if there is one, turned upright by their EXIF orientation.

    Raises `RequestError` for what is no image, damaged, animated, transparent, of more than 8 bits or too large.
    """
    opened, name = _opened(image, "the image")
    if mask is None:
        return GivenImage(opened.convert("RGB"), None, name)
    opened_mask, mask_name = _opened(mask, "the mask")
    if opened_mask.mode not in _MASK_MODES:
        opened_mask = opened_mask.convert("RGB")
    return GivenImage(opened.convert("RGB"), opened_mask, name, mask_name)


def _opened(source: ImageInput, what: str) -> tuple["Image", str]:
    """An image without transparency, upright and in memory; and what to call it."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return _checked(source, what), what
    name = os.fspath(source)
    try:
        # Pillow warns of large images before we refuse them
        with warnings.catch_warnings(action="ignore"), Image.open(name, formats=_FORMATS) as image:
            return _checked(image, name), name
    except FileNotFoundError:
        raise RequestError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise RequestError(f"{name}: not an image that can be read; use PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except RequestError:
        raise
    except OSError as error:  # of the file system with a number, of a cut-off image without
        reason = error.strerror if error.errno else f"damaged or cut off ({error})"
        raise RequestError(f"{name}: {reason or error}") from None
    except Exception as error:  # a damaged image may make the library raise anything
        raise RequestError(f"{name}: damaged: {error}") from None


def _checked(image: "Image", name: str) -> "Image":
    from PIL import ImageOps

    # phones write JPEGs with a second image inside (MPO), of which the first is the photograph
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise RequestError(f"{name}: has {getattr(image, 'n_frames', 'several')} frames; save the one that is meant")
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    if image.mode.startswith(("I", "F")):
        raise RequestError(f"{name}: has more than 8 bits a channel; save it with 8")
    image.load()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        low, _ = image.getchannel("A").getextrema()
        if low != 255:
            raise RequestError(f"{name}: has transparent parts; put it on a background first")
        image = image.convert("RGB")
    upright = ImageOps.exif_transpose(image)
    return image if upright is None else upright


def _too_large(name: str) -> RequestError:
    return RequestError(f"{name}: has more than {MAX_PIXELS // 10**6} million pixels; make it smaller first")


def _size(image: "Image") -> str:
    return f"{image.width}x{image.height}"


def _hash(image: "Image") -> str:
    """Of the pixels, so that a copy in another lossless format, or without its metadata, is the same image."""
    digest = hashlib.sha256(f"{image.mode} {_size(image)} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
