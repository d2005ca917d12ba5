"""The image that image-to-image starts from and the mask of inpainting: read, checked, turned upright, resized.

An image is [1, 3, height, width] in -1 to 1 at the size that is generated, a mask [1, 1, height / 8, width / 8] of the
latents: 1 where the image is repainted and 0 where it is kept. Both are resized as diffusers resizes them (Lanczos;
the mask is then made of zeros and ones, and read at every eighth pixel).
Source: ``VaeImageProcessor`` and ``prepare_mask_latents`` in diffusers.

Reading every eighth pixel loses strokes that are thinner than that. diffusers has no remedy; ours is `mask_grow`, which
widens white areas on every side before the mask is read.
"""

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from numpy.typing import NDArray

from ..arrays import FloatArray
from ..errors import RequestError
from ..model.config import PATCH_SIZE, VaeConfig
from .formats import not_an_image

if TYPE_CHECKING:
    from PIL.Image import Image

ImageInput = Union[str, os.PathLike[str], "Image"]
"""An image file, or an image that Pillow has opened."""

MAX_PIXELS = 100_000_000
"""More than any camera's, less than what exhausts memory: a few kilobytes of file can claim far more."""

MAX_MASK_GROW = 1024
"""Pixels: an eighth of the largest image. Strokes that need more are easier drawn again."""

_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]
_MASK_MODES = ("1", "L", "P", "RGB")  # resized as they are, then made gray, as diffusers does

_WHITE = 128  # the lowest gray value that is nearer to white than to black

Mask = NDArray[np.bool_]  # [height, width]: True is repainted


@dataclass(frozen=True)
class GivenImage:
    """An image as it was given, upright; and its mask."""

    image: "Image"  # RGB
    mask: "Image | None"  # one of `_MASK_MODES`
    image_name: str  # for messages
    mask_name: str = ""
    mask_grow: int = 0  # pixels of the generated image

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
        """What the pipeline starts from, for an image of `width` x `height`.

        Raises `RequestError` for a mask that has another size than the image or repaints nothing.
        """
        from PIL.Image import Resampling

        mask = None if self.mask is None else self._pixel_mask(self.mask, width, height, config.scale)
        return SourceImage(
            pixels=pixels_of(self.image.resize((width, height), Resampling.LANCZOS)),
            mask=None if mask is None else mask[:: config.scale, :: config.scale].astype(np.float32)[None, None],
            pixel_mask=mask,
            image_hash=self.image_hash,
            mask_hash=_hash(self.mask) if self.mask else None,
            mask_grow=self.mask_grow,
        )

    @property
    def image_hash(self) -> str:
        """SHA-256 of the image's pixels."""
        return _hash(self.image)

    def _pixel_mask(self, given: "Image", width: int, height: int, scale: int) -> Mask:
        if given.size not in (self.image.size, (width, height)):
            raise RequestError(
                f"{self.mask_name}: is {_size(given)}, the image {_size(self.image)}; a mask must have the image's size"
            )
        mask = _mask(given, width, height)
        if self.mask_grow:
            mask = _grown(mask | _touched(given, width, height), self.mask_grow)
        if not mask[::scale, ::scale].any():
            raise self._repaints_nothing(given, width, height, scale)
        return mask

    def _repaints_nothing(self, given: "Image", width: int, height: int, scale: int) -> RequestError:
        touched = _touched(given, width, height)
        if not touched.any():
            return RequestError(
                f"{self.mask_name}: the mask has no white pixel (none lighter than middle gray), "
                "so nothing would be repainted"
            )
        # half a cell reaches a sampled pixel, except at the right and bottom edges, beyond the last of them
        reach = (by for by in (scale // 2, scale - 1) if _grown(touched, by)[::scale, ::scale].any())
        return RequestError(
            f"{self.mask_name}: its white strokes are thinner than the {scale}-pixel grid on which latents are masked, "
            f"and fall between the sampled pixels; make them wider, or pass --mask-grow {next(reach)}"
        )


@dataclass(frozen=True)
class SourceImage:
    """What an image is generated from, besides the prompt."""

    pixels: FloatArray  # [1, 3, height, width], -1 to 1
    mask: FloatArray | None  # [1, 1, height / 8, width / 8]: 1 is repainted, 0 is kept
    image_hash: str  # SHA-256 of the image's pixels as they were given
    mask_hash: str | None  # the same of the mask, before it was grown
    mask_grow: int = 0
    pixel_mask: Mask | None = None  # of which `mask` is every eighth pixel

    @property
    def kept_pixels(self) -> FloatArray:
        """The image with gray, 0, where it is repainted."""
        if self.pixel_mask is None:
            return self.pixels
        return self.pixels * ~self.pixel_mask


def pixels_of(image: "Image") -> FloatArray:
    """An RGB image as [1, 3, height, width] in -1 to 1, with diffusers' arithmetic."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    return np.float32(2) * pixels - np.float32(1)


def open_image(image: ImageInput, what: str) -> GivenImage:
    """Reads an image as `open_given` does. `what` it is, is for messages. Raises `RequestError`."""
    opened, name = _opened(image, what)
    return GivenImage(opened.convert("RGB"), None, name)


def open_given(image: ImageInput, mask: ImageInput | None, mask_grow: int = 0) -> GivenImage:
    """Reads an image, and a mask if there is one, turned upright by their EXIF orientation.

    `mask_grow` widens white areas by that many pixels of the generated image, in a square: up, down, sideways and
    diagonally.

    Raises `RequestError` for what is not an image, is damaged, animated, transparent, too large or of more than 8 bits
    per channel, and for a `mask_grow` without a mask, or out of range.
    """
    if isinstance(mask_grow, bool) or not isinstance(mask_grow, int) or not 0 <= mask_grow <= MAX_MASK_GROW:
        raise RequestError(f"mask_grow must be a number of pixels from 0 to {MAX_MASK_GROW}, not {mask_grow!r}")
    if mask_grow and mask is None:
        raise RequestError("mask_grow is for a mask, which is missing")
    given = open_image(image, "the image")
    if mask is None:
        return given
    opened_mask, mask_name = _opened(mask, "the mask")
    if opened_mask.mode not in _MASK_MODES:
        opened_mask = opened_mask.convert("RGB")
    return GivenImage(given.image, opened_mask, given.image_name, mask_name, mask_grow)


def _mask(given: "Image", width: int, height: int) -> Mask:
    """A mask at the size that is generated, as diffusers makes it."""
    from PIL.Image import Resampling

    gray = given.resize((width, height), Resampling.LANCZOS).convert("L")
    white: Mask = np.asarray(gray) >= _WHITE
    return white


def _touched(given: "Image", width: int, height: int) -> Mask:
    """The same, but with every pixel that holds a white pixel of the mask as it was given, however thin its stroke."""
    white: Mask = np.asarray(given.convert("L")) >= _WHITE
    for axis, side in enumerate((height, width)):
        starts = np.arange(side) * white.shape[axis] // side
        white = np.logical_or.reduceat(white, starts, axis)
    return white


def _grown(mask: Mask, by: int) -> Mask:
    """White wherever the square of 2 * `by` + 1 pixels around a pixel contains white."""
    for _ in range(2):  # a square is separable: along rows, and after a transposition along columns
        counts = np.cumsum(np.pad(mask, ((0, 0), (by + 1, by))), axis=1, dtype=np.int32)
        mask = (counts[:, 2 * by + 1 :] > counts[:, : -2 * by - 1]).T
    return mask


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
        raise not_an_image(Path(name), "PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except RequestError:
        raise
    except OSError as error:  # with a number from the file system, without one for an image that is cut off
        reason = error.strerror if error.errno else f"damaged or cut off ({error})"
        raise RequestError(f"{name}: {reason or error}") from None
    except Exception as error:  # a damaged image may make the library raise anything
        raise RequestError(f"{name}: damaged: {error}") from None


def _checked(image: "Image", name: str) -> "Image":
    from PIL import ImageOps

    # phones write JPEGs with a second image inside (MPO), of which the first is the photograph
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise RequestError(
            f"{name}: has {getattr(image, 'n_frames', 'several')} frames; save the one to use as an image of its own"
        )
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    if image.mode.startswith(("I", "F")):
        raise RequestError(f"{name}: has more than 8 bits per channel; save it with 8")
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
