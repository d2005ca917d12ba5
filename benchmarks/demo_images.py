"""What benchmarks do with images of the demo model: generate many of them, compare them, put them on a sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo_model.scenes import Language
from demo_model.scoring import held_out_requests
from zimage_rt import Pipeline
from zimage_rt.bench.accuracy import Pixels, psnr_db
from zimage_rt.bench.synthetic import built
from zimage_runtime.bundle.precision import Precision

Images = list[Pixels]

LANGUAGES: dict[Language, str] = {"en": "English", "zh": "Chinese"}


def prompts(count: int, languages: Sequence[Language] = tuple(LANGUAGES)) -> list[str]:
    """Held-out prompts, `count` in each language."""
    return [prompt for language in languages for _, prompt in held_out_requests(language, count)]


def demo_bundle_in(work: Path, precision: Precision) -> Path:
    """The demo model's bundle in a precision, built again."""
    return built("tiny", work / f"demo-{precision.value}", precision.value, force=True)


def generated(bundle: Path, texts: Sequence[str], **options: Any) -> Images:
    """An image [128, 128, 3] of each prompt, with its place as the seed."""
    with Pipeline.from_bundle(bundle, "cpu") as pipeline:
        return [np.asarray(pipeline.generate(p, seed=n, **options).images[0]) for n, p in enumerate(texts)]


def psnrs(images: Images, others: Images) -> list[float]:
    """Of each image against the other one, in dB; infinite where they are identical."""
    return [psnr_db(one, other) for one, other in zip(images, others, strict=True)]


def quantiles(values: Sequence[float | None], places: Sequence[float], method: Any = "linear") -> list[str]:
    """The values at some places of a distribution, in dB; None are identical images."""
    found = np.quantile([np.inf if value is None else value for value in values], places, method=method)
    return [f"{value:.1f}" if np.isfinite(value) else "same" for value in found]


def sheet(rows: Sequence[Sequence[NDArray[np.uint8] | Image.Image]], gap: int = 6) -> Image.Image:
    """Images of one size on white, row by row."""
    height, width, _ = np.asarray(rows[0][0]).shape
    canvas = np.full((len(rows) * (height + gap) - gap, len(rows[0]) * (width + gap) - gap, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for across, image in enumerate(row):
            top, left = down * (height + gap), across * (width + gap)
            canvas[top : top + height, left : left + width] = np.asarray(image)
    return Image.fromarray(canvas)
