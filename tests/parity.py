"""The fp32 quality gate, and the two ways of generating that it compares.

The gate: with the same prompt, size, steps and seed, the latents after the last step are within 1e-4 of diffusers'
(norm of the difference over the norm), and no channel of a pixel differs by more than 1 of 255.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.arrays import FloatArray
from zimage_runtime.pipeline import ImageEvent, Pipeline

LATENTS_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1


@dataclass(frozen=True)
class Guided:
    """Guidance, in our terms: diffusers' guidance scale is 1 less."""

    scale: float = 4.0
    negative: str = "blurry, dark, a hen that looks at the camera, text and a watermark over all of it"
    normalization: bool = False
    truncation: float = 1.0

    def ours(self) -> dict[str, Any]:
        return {
            "cfg_scale": self.scale,
            "negative": self.negative,
            "cfg_normalization": self.normalization,
            "cfg_truncation": self.truncation,
        }

    def diffusers(self) -> dict[str, Any]:
        return {
            "guidance_scale": self.scale - 1,
            "negative_prompt": self.negative,
            "cfg_normalization": self.normalization,
            "cfg_truncation": self.truncation,
        }


def diffusers_guidance(guided: Guided | None) -> dict[str, Any]:
    return {"guidance_scale": 0.0} if guided is None else guided.diffusers()


@dataclass(frozen=True)
class Case:
    """One image to generate."""

    prompt: str
    size: tuple[int, int] = (64, 64)  # width, height
    steps: int = 4
    seed: int = 0
    guided: Guided | None = None


@dataclass(frozen=True)
class Drawing:
    """What came of it."""

    latents: FloatArray  # [channels, height / 8, width / 8], after the last step
    pixels: NDArray[np.uint8]  # [height, width, 3]


def draw(pipeline: Pipeline, case: Case, count: int = 1, batch_size: int = 1) -> list[Drawing]:
    """Generates `count` images with our pipeline, from the case's seed on."""
    guidance = {} if case.guided is None else case.guided.ours()
    events = pipeline.stream(
        case.prompt,
        size=case.size,
        steps=case.steps,
        seed=case.seed,
        count=count,
        batch_size=batch_size,
        **guidance,
    )
    return [Drawing(e.latents, np.asarray(e.image)) for e in events if isinstance(e, ImageEvent)]


def open_with_diffusers(checkpoint: Path) -> Any:
    """diffusers' pipeline in float32, on one thread."""
    import torch
    from diffusers import ZImagePipeline

    torch.set_num_threads(1)  # ten times faster at these sizes, where threads mostly wait for one another
    pipeline = ZImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_with_diffusers(pipeline: Any, case: Case) -> Drawing:
    """Generates one image with diffusers: its pipeline up to the latents, then the decoding that it would do."""
    import torch

    width, height = case.size
    with torch.no_grad():
        latents = pipeline(
            prompt=case.prompt,
            width=width,
            height=height,
            num_inference_steps=case.steps,
            generator=torch.Generator("cpu").manual_seed(case.seed),
            output_type="latent",
            **diffusers_guidance(case.guided),
        ).images
        config = pipeline.vae.config
        decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        (image,) = pipeline.image_processor.postprocess(decoded, output_type="pil")
    return Drawing(latents[0].numpy(), np.asarray(image))


def next_seeds(case: Case, count: int) -> list[Case]:
    """The case with its own seed and the ones that follow."""
    return [replace(case, seed=case.seed + index) for index in range(count)]


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Norm of the difference over the norm of what was expected."""
    assert found.shape == expected.shape
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def check_parity(found: Drawing, expected: Drawing) -> None:
    """The gate. Raises `AssertionError`."""
    assert np.ptp(expected.pixels) > 0, "the reference image is blank and proves nothing"
    error = relative_error(found.latents, expected.latents)
    assert error <= LATENTS_TOLERANCE, f"latents are {error:.2g} away from diffusers'"
    assert found.pixels.shape == expected.pixels.shape
    furthest = int(np.abs(found.pixels.astype(int) - expected.pixels).max())
    assert furthest <= PIXEL_TOLERANCE, f"a pixel is {furthest} of 255 away from diffusers'"
