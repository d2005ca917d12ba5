"""Previews: latents as a small image, a pixel for each place of the latents."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import FloatArray
from ..bundle.files import atomic_write
from ..model.preview_map import PreviewMap
from .formats import image_format
from .pixels import to_image

if TYPE_CHECKING:
    from PIL.Image import Image


def preview_image(latents: FloatArray, colours: PreviewMap) -> "Image":
    """Latents [channels, height / 8, width / 8] as an image of height / 8 x width / 8 pixels."""
    factors = np.array(colours.factors, np.float32)
    bias = np.array(colours.bias, np.float32)
    return to_image(np.tensordot(factors, latents, axes=(0, 0)) + bias[:, None, None])


def write_preview(image: "Image", path: Path) -> None:
    """Replaces the file at `path`, so that a viewer sees one whole preview or the other. PNG, JPEG or WebP.

    Raises `RequestError` for another extension, `OSError` where the file cannot be written.
    """
    from .image_files import encode_image

    data = encode_image(image, image_format(path), None)
    try:
        with atomic_write(path, durable=False) as file:
            file.write(data)
    except OSError as error:  # which names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from None
