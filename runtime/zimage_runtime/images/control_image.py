"""The image that a ControlNet reads: a map (edges, depth, pose, …) as it was given, or edges made from a photograph.

It is resized to the size that is generated as a source image is (Lanczos, as in diffusers), and must have its shape.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from ..arrays import FloatArray
from ..errors import RequestError
from ..model.control_type import ControlType
from .source_image import GivenImage, ImageInput, open_image, pixels_of

_LOWER, _UPPER = 100, 200
"""The thresholds of Canny's edges: those of ControlNet's first examples and of VideoX-Fun's."""

_STRETCHED = 16
"""Pixels by which resizing may almost stretch a side: sizes are multiples of it, maps need not be."""


@dataclass(frozen=True)
class ControlImage:
    """What a ControlNet reads, at the size that is generated."""

    pixels: FloatArray  # [1, 3, height, width], -1 to 1
    image_hash: str  # SHA-256 of the image's pixels as they were given


def open_control_image(image: ImageInput) -> GivenImage:
    """Reads a control image, with the conditions of a source image. Raises `RequestError`."""
    return open_image(image, "the control image")


def make_control_image(given: GivenImage, width: int, height: int, kind: ControlType | None) -> ControlImage:
    """The control image for an image of `width` x `height`.

    Raises `RequestError` for one of another shape, and where OpenCV is missing and needed.
    """
    from PIL import Image

    own_width, own_height = given.image.size
    if abs(own_width * height - own_height * width) >= _STRETCHED * max(own_width, own_height):
        fitting = round(width * own_height / own_width / _STRETCHED) * _STRETCHED
        raise RequestError(
            f"{given.image_name}: is {own_width}x{own_height}, which is of another shape than the image, "
            f"{width}x{height}; cut or pad it, or choose a size like {width}x{max(fitting, _STRETCHED)}"
        )
    image = given.image.resize((width, height), Image.Resampling.LANCZOS)
    if kind is ControlType.CANNY:
        image = Image.fromarray(_edges(np.asarray(image))).convert("RGB")
    return ControlImage(pixels_of(image), given.image_hash)


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Canny's edges of [height, width, 3]: [height, width], 255 on an edge."""
    check_opencv()
    import cv2

    edges: np.ndarray = cv2.Canny(np.ascontiguousarray(pixels), _LOWER, _UPPER)
    return edges


def check_opencv() -> None:
    """Raises `RequestError` with the command that installs OpenCV, if it is missing."""
    if find_spec("cv2") is None:
        raise RequestError(
            "making edges from a photograph needs OpenCV: pip install 'zimage-rt[control]', or give a map without a "
            "control type"
        )
