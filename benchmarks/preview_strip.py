"""The preview of every step beside the image that comes of it: the strip in the documentation.

PYTHONPATH=. python benchmarks/preview_strip.py docs/previews.png
"""

import sys
from pathlib import Path

from demo_images import sheet
from PIL import Image

from zimage_rt import ImageEvent, Pipeline, StepEvent, demo_bundle

PROMPTS = ("a red circle left of a blue square", "a yellow heart on a light blue to pink gradient background")
SEED, SIDE, GAP = 12, 96, 4


def main(out: Path) -> None:
    """Generates with one seed; a row for each prompt, previews enlarged pixel by pixel."""
    with Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        rows = [row(pipeline, prompt) for prompt in PROMPTS]
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, GAP).save(out, optimize=True)


def row(pipeline: Pipeline, prompt: str) -> list[Image.Image]:
    """The previews of an image, and the image."""
    found = []
    for event in pipeline.stream(prompt, seed=SEED):
        if isinstance(event, StepEvent):
            found.append(event.preview().resize((SIDE, SIDE), Image.Resampling.NEAREST))
        elif isinstance(event, ImageEvent):
            found.append(event.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
