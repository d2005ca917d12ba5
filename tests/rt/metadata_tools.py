"""What tests of image metadata share: the formats, an image from the command, its pixels."""

from pathlib import Path
from typing import Any

import numpy as np
from cli_tools import Capture, call_rt
from facts import assert_facts
from PIL import Image

from zimage_runtime.images.formats import ImageFormat

FORMATS = {".png": ImageFormat.PNG, ".jpg": ImageFormat.JPEG, ".webp": ImageFormat.WEBP}


def generate(capsys: Capture, bundle: Path, prompt: str, output: str, *options: object) -> Path:
    size = ("--size", "48x32", "--steps", 2, "--seed", 7)
    outcome = call_rt(capsys, "run", "-m", bundle, *size, "-o", output, "--quiet", *options, "--", prompt)
    assert outcome.status == 0, outcome.err
    for line in outcome.err.splitlines():
        assert_facts(line, "prompt", "tokens")  # of prompts that are cut
    return Path(output)


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)
