"""Masks of inpainting: which latents they repaint, masks with thin strokes, and masks that are refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_rt, unchanged
from facts import raises_with
from PIL import Image, ImageDraw, ImageFilter

from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.arrays import FloatArray
from zimage_runtime.errors import RequestError
from zimage_runtime.images.source_image import MAX_MASK_GROW, SourceImage, open_given

SIZE = (96, 64)  # width, height
VAE = SMALL.config.vae
GRID = 8


def black(size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("L", size)


def stroke(*box: int, size: tuple[int, int] = SIZE, color: int = 255) -> Image.Image:
    """A mask with one white rectangle: left, top, right and bottom, all included."""
    mask = black(size)
    ImageDraw.Draw(mask).rectangle(box, fill=color)
    return mask


def soft(size: tuple[int, int] = SIZE) -> Image.Image:
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    return Image.fromarray(np.clip((np.sin(19 * x + 14 * y) - 0.2) * 300 + 128, 0, 255).astype(np.uint8))


def source(mask: Image.Image, grow: int = 0, size: tuple[int, int] = SIZE) -> SourceImage:
    return open_given(Image.new("RGB", mask.size), mask, grow).resized(*size, VAE)


def latents(mask: Image.Image, grow: int = 0, size: tuple[int, int] = SIZE) -> FloatArray:
    """Which latents are repainted: [height / 8, width / 8]."""
    found = source(mask, grow, size).mask
    assert found is not None
    assert found.dtype == np.float32
    assert found.shape == (1, 1, size[1] // GRID, size[0] // GRID)
    return found[0, 0]


def advised(mask: Image.Image, size: tuple[int, int] = SIZE) -> int:
    """The --mask-grow that the error for thin strokes names."""
    with raises_with(RequestError, "mask", GRID, "--mask-grow") as caught:
        latents(mask, size=size)
    (number,) = re.findall(r"--mask-grow (\d+)", str(caught.value))
    return int(number)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_white_is_repainted_and_black_kept(mode: str) -> None:
    expected = np.zeros((8, 12))
    expected[2:4, 3:6] = 1  # read at rows 16 and 24, columns 24, 32 and 40
    np.testing.assert_array_equal(latents(stroke(24, 16, 47, 31).convert(mode)), expected)


@pytest.mark.parametrize("grow", [1, 3, 4, 9, pytest.param(200, marks=pytest.mark.deep)])
@pytest.mark.parametrize("mask", [soft(), stroke(0, 0, 2, 5), stroke(90, 60, 95, 63)], ids=["soft", "first", "last"])
def test_a_mask_grows_as_pillows_filter_grows_it(mask: Image.Image, grow: int) -> None:
    white = mask.point(lambda value: 255 * (value >= 128))
    expected = np.asarray(white.filter(ImageFilter.MaxFilter(2 * grow + 1)))[::GRID, ::GRID] / 255
    if not expected.any():
        with pytest.raises(RequestError):
            latents(mask, grow)
    else:
        np.testing.assert_array_equal(latents(mask, grow), expected)


@pytest.mark.parametrize("given", [SIZE, (301, 203), (48, 32), (12, 8)])
def test_a_mask_that_grows_repaints_no_less(given: tuple[int, int]) -> None:
    before = latents(soft(given), 0)
    for grow in (1, 4, 8, 16):
        after = latents(soft(given), grow)
        assert (after >= before).all()
        before = after
    assert before.sum() > latents(soft(given), 0).sum()


def test_what_resizing_makes_white_stays_white_when_the_mask_grows() -> None:
    """Between gray and white, an enlarged mask is white farther than the white pixel it was enlarged from."""
    mask = Image.new("L", (6, 4), 127)
    mask.paste(255, (2, 0, 3, 4))
    plain, grown = latents(mask), latents(mask, 1)
    assert plain.any(axis=0).sum() > 2  # columns of latents; the white pixel covers two
    assert (grown >= plain).all()


def test_the_hash_is_of_the_mask_as_it_was_given() -> None:
    plain, grown = source(soft()), source(soft(), 4)
    assert (plain.mask_grow, grown.mask_grow) == (0, 4)
    assert plain.mask_hash == grown.mask_hash is not None
    assert plain.mask_hash != source(soft().point(lambda value: 255 - value)).mask_hash


def test_a_mask_without_white_says_so() -> None:
    for mask in (black(), Image.new("L", SIZE, 127), Image.new("RGB", SIZE, (255, 0, 0))):
        for grow in (0, 4):
            with raises_with(RequestError, "mask", "white") as caught:
                latents(mask, grow)
            assert "--mask-grow" not in str(caught.value)


@pytest.mark.parametrize(
    ("box", "grow"),
    [
        ((10, 2, 12, 40), 4),  # between the columns 8 and 16
        ((2, 3, 60, 4), 4),
        ((12, 12, 12, 12), 4),  # as far from the grid as can be
        ((93, 0, 95, 63), 7),  # beyond the last column that is read, 88
        ((92, 61, 92, 61), 7),
    ],
)
def test_strokes_that_are_too_thin_are_repainted_if_they_grow(box: tuple[int, ...], grow: int) -> None:
    mask = stroke(*box)
    assert advised(mask) == grow
    assert latents(mask, grow).any()


def test_every_white_pixel_is_repainted_with_the_growth_that_is_advised() -> None:
    for x in range(80, 96):
        for y in (*range(8), *range(56, 64)):
            dot = stroke(x, y, x, y)
            found = latents(dot, advised(dot) if x % GRID or y % GRID else 0)
            rows, columns = np.nonzero(found)
            assert (np.abs(rows * GRID - y) < GRID).all()
            assert (np.abs(columns * GRID - x) < GRID).all()


@pytest.mark.parametrize("given", [(960, 640), (1001, 603)])
def test_strokes_that_resizing_would_lose_are_repainted_if_they_grow(given: tuple[int, int]) -> None:
    """A line of one pixel on a photograph is a tenth of a pixel of the image."""
    line = stroke(given[0] // 2, 0, given[0] // 2, given[1], size=given)
    assert latents(line, advised(line)).any(axis=1).all()


def test_a_mask_that_grew_repaints_what_it_touches_and_no_more() -> None:
    found = latents(stroke(40, 32, 41, 33), 4)  # 36 to 45 and 28 to 37
    assert np.argwhere(found).tolist() == [[4, 5]]


@pytest.mark.parametrize("grow", [-1, 2.5, True, "4", None, MAX_MASK_GROW + 1])
def test_growth_that_is_no_number_of_pixels(grow: Any) -> None:
    with raises_with(RequestError, "mask_grow", MAX_MASK_GROW, repr(grow)):
        open_given(Image.new("RGB", SIZE), soft(), grow)


def test_growth_of_no_mask() -> None:
    with raises_with(RequestError, "mask_grow", "mask"):
        open_given(Image.new("RGB", SIZE), None, 4)


def test_a_mask_of_another_size_than_the_image() -> None:
    given = open_given(Image.new("RGB", (96, 64)), black((64, 64)))
    with raises_with(RequestError, "64x64", "96x64"):
        given.resized(96, 64, VAE)
    # a mask of the size that is generated is accepted
    white = open_given(Image.new("RGB", (96, 64)), Image.new("L", (64, 64), 255))
    mask = white.resized(64, 64, VAE).mask
    assert mask is not None
    assert mask.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(("mask", "named"), [(black(), "white"), (stroke(9, 9, 11, 30), "--mask-grow 4")])
def test_the_command_says_it_in_one_line(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, mask: Image.Image, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", SIZE).save("in.png")
    mask.save("mask.png")
    with unchanged(Path()):
        outcome = call_rt(
            *(capsys, "run", "a fox", "-m", bundle, "--steps", 2, "-o", "out.png", "--quiet"),
            *("--image", "in.png", "--mask", "mask.png"),
        )
    assert_one_line_error(outcome, "mask.png", named)
