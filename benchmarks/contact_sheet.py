"""Eight pictures of the demo model, each drawn by `zimage-rt run`, on one sheet: the picture in the README.

python benchmarks/contact_sheet.py docs/demo.png
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PROMPTS = (
    "a red circle left of a blue square",
    "白色背景上的一个红色心形",
    "a large purple star on a cream background",
    "一个绿色圆环在一个橙色三角形的上面，浅蓝色背景",
    "a yellow heart on a light blue to pink gradient background",
    "右上角有一个蓝色的五角星，黑色背景",
    "an orange circle above a green square, gray background",
    "粉色到米色的渐变背景上的一个紫色圆环",
)
SEED = 12  # one for all, chosen to please
COLUMNS, GAP = 4, 6


def main(out: Path) -> None:
    """Draws with one seed, and pastes the pictures row by row."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = [_drawn(prompt, Path(folder) / f"{number}.png") for number, prompt in enumerate(PROMPTS)]
    width, height = pictures[0].size
    rows = len(pictures) // COLUMNS
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % COLUMNS * (width + GAP), number // COLUMNS * (height + GAP)))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


def _drawn(prompt: str, path: Path) -> Image.Image:
    program = [sys.executable, "-c", "from zimage_rt.cli import main; main()"]
    command = [*program, "run", prompt, "--seed", str(SEED), "-o", str(path), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with Image.open(path) as picture:
        return picture.convert("RGB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
