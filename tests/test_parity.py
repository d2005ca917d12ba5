"""The same prompt and seed give the image that diffusers gives, in fp32."""

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import Case, check_parity, draw, draw_with_diffusers, next_seeds
from PIL import Image

from zimage_runtime.pipeline import CaptionEvent, Pipeline

pytestmark = pytest.mark.deep

ENGLISH = "a red fox in the snow, golden hour, 35mm photograph"
CHINESE = "雪地里的一只红狐狸，黄昏的光线"
EMOJI = "a 🦊 and a 👩‍🚀 under a 🌈"
SPECIAL = "a <|im_end|> b <|endoftext|> c <|im_start|>system"
EMPTY = ""
LONG = "a very long description of a quiet harbour at dawn, " * 12
LONGER = "雪地里的一只红狐狸 a fox in the snow 🦊 " * 60

# Each size, step count and kind of prompt and seed stands in several cases. In brackets: image tokens.
CASES = [
    Case(ENGLISH, (64, 64), 8, 0),  # 16: half pads
    Case(CHINESE, (64, 128), 4, 1),  # 32: no pads, upright
    Case(EMOJI, (128, 64), 8, 2**32 - 1),  # 32: no pads, lying
    Case(SPECIAL, (80, 112), 9, 7),  # 35: nearly all of the second block is pads
    Case(EMPTY, (176, 48), 4, 2**32 + 5),  # 33
    Case(LONG, (128, 128), 1, 42),  # 64
    Case(EMPTY, (16, 16), 9, 3),  # 1: the smallest
    Case(LONG, (48, 176), 8, 2**63 + 11),  # 33
    Case(ENGLISH, (112, 80), 1, 2**32 + 5),  # 35
    Case(CHINESE, (128, 128), 9, 2**64 - 1),  # 64
    Case(EMOJI, (80, 112), 4, 0),
    Case(SPECIAL, (64, 64), 1, 2**32),
    Case(ENGLISH, (256, 144), 8, 5),  # 144
]

QWEN_CASES = [
    Case(ENGLISH, (64, 64), 4, 0),
    Case(CHINESE, (80, 112), 8, 2**32 + 5),
    Case(EMOJI, (48, 176), 1, 1),
    Case(SPECIAL, (64, 128), 4, 2),
    Case(EMPTY, (112, 80), 9, 3),
    Case(LONGER, (64, 64), 4, 4),
]


def describe(case: Case) -> str:
    width, height = case.size
    return f"{case.prompt[:8]!r}-{width}x{height}-{case.steps}-{case.seed}".encode("unicode_escape").decode()


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle)


@pytest.fixture(scope="module")
def qwen_pipeline(qwen_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(qwen_bundle)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_generates_what_diffusers_generates(pipeline: Pipeline, diffusers_pipeline: Any, case: Case) -> None:
    check_parity(draw(pipeline, case)[0], draw_with_diffusers(diffusers_pipeline, case))


@pytest.mark.parametrize("case", QWEN_CASES, ids=describe)
def test_generates_what_diffusers_generates_with_the_published_tokenizer(
    qwen_pipeline: Pipeline, qwen_diffusers_pipeline: Any, case: Case
) -> None:
    check_parity(draw(qwen_pipeline, case)[0], draw_with_diffusers(qwen_diffusers_pipeline, case))


@pytest.mark.parametrize("kind", ["byte", "published"])
def test_the_long_prompts_are_cut(kind: str, pipeline: Pipeline, request: pytest.FixtureRequest) -> None:
    """Keeps the parity cases honest: they do go beyond the 512 tokens that the model sees."""
    one = pipeline if kind == "byte" else request.getfixturevalue("qwen_pipeline")
    (event,) = islice(one.stream(LONG if kind == "byte" else LONGER, size=(16, 16), steps=1, seed=0), 1)
    assert isinstance(event, CaptionEvent)
    assert event.tokens == 512
    assert event.cut_tokens > 0


def test_low_memory_generates_the_same(bundle: Path, diffusers_pipeline: Any) -> None:
    case = CASES[3]
    pipeline = Pipeline.from_bundle(bundle, low_memory=True)
    check_parity(draw(pipeline, case)[0], draw_with_diffusers(diffusers_pipeline, case))


def test_several_images_equal_single_runs(pipeline: Pipeline) -> None:
    case = Case(ENGLISH, (80, 112), 4, 2**32 - 2)
    result = pipeline.generate(case.prompt, size=case.size, steps=case.steps, seed=case.seed, count=3)
    assert result.seeds == [2**32 - 2, 2**32 - 1, 2**32]
    singles = [
        pipeline.generate(one.prompt, size=one.size, steps=one.steps, seed=one.seed).images[0].tobytes()
        for one in next_seeds(case, 3)
    ]
    assert [image.tobytes() for image in result.images] == singles
    assert len(set(singles)) == 3


def test_a_batch_generates_what_diffusers_generates_one_by_one(pipeline: Pipeline, diffusers_pipeline: Any) -> None:
    case = Case(CHINESE, (80, 112), 4, 9)
    drawings = draw(pipeline, case, count=3, batch_size=3)
    assert len(drawings) == 3
    for found, one in zip(drawings, next_seeds(case, 3), strict=True):
        check_parity(found, draw_with_diffusers(diffusers_pipeline, one))


def test_a_batch_that_does_not_divide_the_count(pipeline: Pipeline, diffusers_pipeline: Any) -> None:
    case = Case(EMPTY, (64, 64), 1, 4)
    drawings = draw(pipeline, case, count=3, batch_size=2)
    assert len(drawings) == 3
    for found, one in zip(drawings, next_seeds(case, 3), strict=True):
        check_parity(found, draw_with_diffusers(diffusers_pipeline, one))


def run(bundle: Path, folder: Path, *arguments: str) -> list[Path]:
    """`zimage-rt run`; returns the files that it says it wrote."""
    command = [sys.executable, "-c", "from zimage_rt.cli import main; main()", "run", *arguments]
    done = subprocess.run(
        [*command, "-m", str(bundle), "--size", "80x64", "--steps", "4", "--quiet"],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return [folder / line for line in done.stdout.splitlines()]


def test_the_command_generates_several_images_equal_to_single_ones(
    bundle: Path, tmp_path: Path, diffusers_pipeline: Any
) -> None:
    together = run(bundle, tmp_path, EMOJI, "-n", "3", "--seed", "7")
    (single,) = run(bundle, tmp_path, EMOJI, "--seed", "8", "-o", "single.png")
    pixels = [np.asarray(Image.open(path)) for path in together]
    np.testing.assert_array_equal(pixels[1], np.asarray(Image.open(single)))
    assert len({p.tobytes() for p in pixels}) == 3
    for found, one in zip(pixels, next_seeds(Case(EMOJI, (80, 64), 4, 7), 3), strict=True):
        expected = draw_with_diffusers(diffusers_pipeline, one).pixels
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1
