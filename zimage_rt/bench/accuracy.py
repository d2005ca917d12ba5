"""Is it the right image? A row whose image is constant or beyond the gate has failed, however fast it was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zimage_runtime.bundle.precision import Precision

from .schema import FAILED, Accuracy, Reading, Row, absent

Pixels = NDArray[np.uint8]

_OTHER_SYSTEMS_DB = {"q8_0": 20.0}
"""The gates of precisions that only other systems have."""

_LOOSEST_DB = min(*(precision.gate.psnr_db for precision in Precision), *_OTHER_SYSTEMS_DB.values())

IDENTICAL = "the images are identical"
NO_REFERENCE = "no float32 reference: give --reference or --checkpoint"


@dataclass(frozen=True)
class Reference:
    """The image that a case's is compared with, and what generated it; or why there is none."""

    name: str | None
    pixels: Pixels | None
    reason: str = NO_REFERENCE


def gate_db(precision: str) -> float:
    """The least PSNR to the float32 image that a precision passes with; the loosest for an unknown precision.

    Another system's precision of one of our names has our gate.
    """
    if precision in list(Precision):
        return Precision(precision).gate.psnr_db
    return _OTHER_SYSTEMS_DB.get(precision, _LOOSEST_DB)


def read_pixels(path: Path) -> Pixels:
    """An image file's pixels, [height, width, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def judge(pixels: Pixels, precision: str, reference: Reference, digests: Sequence[str]) -> tuple[Accuracy, str | None]:
    """An image's accuracy, and why its row has failed; None where it has not. `digests` are of every image's pixels."""
    gate = gate_db(precision)
    repeatable = len(set(digests)) == 1 if len(digests) > 1 else None
    if reference.pixels is None:
        none = absent(reference.reason)
        accuracy = Accuracy(None, none, False, none, none, gate, repeatable)
        return accuracy, _constant(pixels)
    if reference.pixels.shape != pixels.shape:
        reason = f"the image is {_size(pixels)}, the reference {_size(reference.pixels)}"
        none = absent(reason)
        return Accuracy(reference.name, none, False, none, none, gate, repeatable), reason
    psnr = psnr_db(pixels, reference.pixels)
    identical = math.isinf(psnr)
    accuracy = Accuracy(
        reference=reference.name,
        psnr_db=absent(IDENTICAL) if identical else Reading(round(psnr, 2)),
        identical=identical,
        max_difference=Reading(int(np.abs(pixels.astype(int) - reference.pixels).max())),
        perceptual=flip(pixels, reference.pixels),
        gate_db=gate,
        repeatable=repeatable,
    )
    if psnr < gate:
        return accuracy, f"{psnr:.1f} dB from {reference.name}, {precision} must reach {gate:g} dB"
    return accuracy, _constant(pixels)


def unchecked(row: Row) -> str | None:
    """Why a row that has not failed is not checked either; None for any other row."""
    if row.status == FAILED or (row.accuracy and row.accuracy.reference):
        return None
    return (row.accuracy.psnr_db.reason if row.accuracy else None) or NO_REFERENCE


def psnr_db(pixels: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio of 8-bit images; infinite for identical ones."""
    mean_square = float(np.mean((pixels.astype(np.float64) - reference) ** 2))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def relative_error(values: Any, reference: Any) -> float:
    """The norm of the difference over the reference's; infinite where a value is not finite."""
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if not np.isfinite(values).all():
        return math.inf
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def flip(pixels: Pixels, reference: Pixels) -> Reading:
    """The mean FLIP error, 0 to 1, at 67 pixels per degree. Source: Andersson and others, FLIP, HPG 2020."""
    import flip_evaluator

    unit = [(image / np.float32(255)).astype(np.float32) for image in (reference, pixels)]
    return Reading(round(float(flip_evaluator.evaluate(*unit, "LDR", applyMagma=False)[1]), 5))


def _constant(pixels: Pixels) -> str | None:
    spread = int(np.ptp(pixels.reshape(-1, 3), axis=0).max())
    return "the image is constant" if spread <= 1 else None


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
