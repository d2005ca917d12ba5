"""What the decoder gives, as an image."""

from typing import TYPE_CHECKING

import numpy as np

from ..arrays import FloatArray
from ..errors import ExecutorError

if TYPE_CHECKING:
    from PIL.Image import Image


def to_image(values: FloatArray) -> "Image":
    """[3, height, width] in about -1 to 1 → 8-bit RGB, rounded as diffusers rounds. Raises `ExecutorError`."""
    from PIL import Image

    if not np.isfinite(values).all():
        raise ExecutorError("the decoder gave values that are not finite; verify the bundle")
    unit = np.clip(values * np.float32(0.5) + np.float32(0.5), 0, 1)
    pixels = np.rint(unit.transpose(1, 2, 0) * np.float32(255)).astype(np.uint8)
    return Image.fromarray(pixels)
