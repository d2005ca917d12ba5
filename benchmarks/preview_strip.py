"""The preview of every step beside the image that comes of it: the strip in the documentation.

python benchmarks/preview_strip.py docs/previews.png
"""

import sys
from pathlib import Path

from PIL import Image

from zimage_rt import ImageEvent, Pipeline, StepEvent, demo_bundle

PROMPTS = ("a red circle left of a blue square", "a yellow heart on a light blue to pink gradient background")
SEED, SIDE, GAP = 12, 96, 4


def main(out: Path) -> None:
    """Generates with one seed; a row for each prompt, previews enlarged pixel by pixel."""
    with Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        rows = [_row(pipeline, prompt) for prompt in PROMPTS]
    columns = len(rows[0])
    strip = Image.new("RGB", (columns * (SIDE + GAP) - GAP, len(rows) * (SIDE + GAP) - GAP), "white")
    for down, row in enumerate(rows):
        for across, image in enumerate(row):
            strip.paste(image, (across * (SIDE + GAP), down * (SIDE + GAP)))
    out.parent.mkdir(parents=True, exist_ok=True)
    strip.save(out, optimize=True)


def _row(pipeline: Pipeline, prompt: str) -> list[Image.Image]:
    found = []
    for event in pipeline.stream(prompt, seed=SEED):
        if isinstance(event, StepEvent):
            found.append(event.preview().resize((SIDE, SIDE), Image.Resampling.NEAREST))
        elif isinstance(event, ImageEvent):
            found.append(event.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
