"""Source images and masks: how they are read, what is refused, and what `run --image` records of them."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, Outcome, assert_one_line_error, call_rt, unchanged
from facts import raises_with
from PIL import Image, PngImagePlugin

from zimage_runtime.errors import RequestError
from zimage_runtime.images import source_image
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.images.source_image import open_given


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made_image(width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2}[mode]
    values = np.random.default_rng(2).integers(0, 256, (height, width, channels)).astype(np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def run(capsys: Capture, bundle: Path, *options: object, steps: int = 2) -> Outcome:
    return call_rt(
        *(capsys, "run", "a fox", "-m", bundle, "--steps", steps, "--seed", 7, "--quiet", "-o", "out.png"), *options
    )


def refuse(capsys: Capture, bundle: Path, *options: object, named: tuple[object, ...], status: int = 1) -> None:
    with unchanged(Path()):
        outcome = run(capsys, bundle, *options)
    assert_one_line_error(outcome, *named, status=status)


def generated(capsys: Capture, bundle: Path, *options: object) -> Any:
    outcome = run(capsys, bundle, *options)
    assert (outcome.status, outcome.err) == (0, "")
    with Image.open("out.png") as image:
        return np.asarray(image)


def given(source: str | Path | Image.Image) -> Any:
    """The pixels of a source image as they are read."""
    return np.asarray(open_given(source if isinstance(source, Image.Image) else str(source), None).image)


def refused(source: str | Path | Image.Image, *named: object) -> None:
    """It is refused both as an image and as a mask, by an error that names all of `named`."""
    for image, mask in ((source, None), (made_image(), source)):
        with raises_with(RequestError, *named):
            open_given(image, mask)


def test_what_was_started_from_is_recorded_and_replayed(bundle: Path, capsys: Capture) -> None:
    made_image().save("in.png")
    made_image(mode="L").save("mask.png")
    generated(capsys, bundle, "--image", "in.png", "--mask", "mask.png", "--strength", 0.6)
    info = read_image_info(Path("out.png"))
    assert (info.steps, info.strength, info.width, info.height) == (2, 0.6, 48, 32)
    with Image.open("out.png") as image:
        assert "Denoising strength: 0.6" in image.info["parameters"]
    # the same pixels in another file are the same image
    made_image().save("copy.bmp")
    replay = ("run", "--replay", "out.png", "-m", bundle, "--quiet", "-o", "again.png")
    outcome = call_rt(capsys, *replay, "--image", "copy.bmp", "--mask", "mask.png")
    assert (outcome.lines, outcome.err) == (["again.png"], "")
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    made_image(64, 32).save("other.png")
    for options, named in (
        ((), ("out.png", "--image")),
        (("--image", "in.png"), ("out.png", "--mask")),
        (("--image", "other.png", "--mask", "mask.png"), ("mask.png", "48x32", "64x32")),
        (("--image", "in.png", "--mask", "in.png"), ("in.png", "out.png", "differ")),
    ):
        with unchanged(Path()):
            outcome = call_rt(capsys, *replay, *options)
        # the size is the recorded one, so a mask that fits it is accepted, and the hashes differ
        assert_one_line_error(outcome, *(named if options[:2] != ("--image", "other.png") else ("other.png", "differ")))
    outcome = call_rt(capsys, *replay, "--image", "in.png", "--mask", "mask.png", "--strength", 0.6)
    assert_one_line_error(outcome, "--strength", status=2)


def test_replay_of_an_image_from_a_prompt_alone_takes_no_image(bundle: Path, capsys: Capture) -> None:
    made_image().save("in.png")
    generated(capsys, bundle, "--size", "48x32")
    outcome = call_rt(capsys, "run", "--replay", "out.png", "-m", bundle, "--quiet", "--image", "in.png")
    assert_one_line_error(outcome, "out.png", "--image")


def test_size_is_the_images_own_cut_to_multiples_of_16_or_the_one_given(bundle: Path, capsys: Capture) -> None:
    made_image(63, 49).save("in.png")
    assert generated(capsys, bundle, "--image", "in.png").shape == (48, 48, 3)
    assert generated(capsys, bundle, "--image", "in.png", "--size", "32x64").shape == (64, 32, 3)


_AS_STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}
"""EXIF's orientations, and how an upright image is stored under each."""


@pytest.mark.parametrize(("orientation", "stored"), _AS_STORED.items())
def test_images_and_masks_are_turned_upright(orientation: int, stored: Callable[[Image.Image], Image.Image]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright, mask = made_image(), made_image(mode="L")
    stored(upright).save("in.png", exif=exif)
    stored(mask).save("mask.png", exif=exif)
    found = open_given("in.png", "mask.png")
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(upright))
    assert found.mask is not None
    np.testing.assert_array_equal(np.asarray(found.mask), np.asarray(mask))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_other_kinds_of_images_are_read(mode: str) -> None:
    """An alpha channel that hides nothing is dropped."""
    name = "in.tiff" if mode == "CMYK" else "in.png"
    image = made_image().convert(mode)
    image.save(name)
    for source in (name, image):
        np.testing.assert_array_equal(given(source), np.asarray(image.convert("RGB")))


def test_a_cmyk_photograph_is_read() -> None:
    made_image().convert("CMYK").save("in.jpg", quality=100, subsampling=0)
    difference = given("in.jpg").astype(int) - np.asarray(made_image().convert("CMYK").convert("RGB"))
    assert np.abs(difference).mean() < 4  # inverted, as JPEGs store these, it would be 100


def test_a_palette_with_a_transparent_color_that_is_used_is_refused() -> None:
    image = made_image().quantize(16)
    for name in ("in.png", "in.gif"):
        image.save(name, transparency=image.getpixel((0, 0)))
        refused(name, name, "transparent")
    unused = Image.new("P", (48, 32), 1)
    unused.putpalette([255, 0, 0, 0, 255, 0])
    unused.save("in.png", transparency=0)
    with Image.open("in.png") as opened:
        assert (opened.mode, opened.info["transparency"]) == ("P", 0)
    assert (given("in.png") == (0, 255, 0)).all()


def test_a_photograph_with_a_second_image_inside_is_no_animation() -> None:
    made_image().save("phone.jpg", "MPO", save_all=True, append_images=[made_image(24, 16)])
    with Image.open("phone.jpg") as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("MPO", 2)
    assert given("phone.jpg").shape == (32, 48, 3)


def test_images_that_are_none(bundle: Path, capsys: Capture) -> None:
    Path("text.png").write_text("a fox")
    Path("empty.png").write_bytes(b"")
    Path("folder").mkdir()
    refuse(capsys, bundle, "--image", "text.png", named=("text.png", "image"))
    made_image().save("in.png")
    refuse(capsys, bundle, "--image", "in.png", "--mask", "text.png", named=("text.png", "image"))
    refused("empty.png", "empty.png", "image")
    refused("folder", "folder", "directory")
    refused("gone.png", "gone.png", "no such file")


GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 12345\n" % (b"0" * 64)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (GIT_LFS_POINTER, "`git lfs pull`"),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "HTML"),
        (b"\xef\xbb\xbf\r\n  <HTML lang=en>", "HTML"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN">', "HTML"),
    ],
    ids=["lfs", "html", "old html", "xhtml"],
)
def test_what_is_often_saved_in_an_images_place_is_named(data: bytes, named: str) -> None:
    Path("in.png").write_bytes(data)
    refused("in.png", "in.png", named)
    with raises_with(RequestError, "in.png", named):
        read_image_info(Path("in.png"))


@pytest.mark.parametrize("data", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"a page about <html>", b"\0<html>"])
def test_other_files_are_not_called_web_pages(data: bytes) -> None:
    Path("in.png").write_bytes(data)
    with raises_with(RequestError, "in.png", "image") as caught:
        open_given("in.png", None)
    assert "HTML" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_an_image_that_is_cut_off(suffix: str) -> None:
    path = Path(f"in{suffix}")
    made_image().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, path, "damaged")


def test_an_image_with_transparent_parts() -> None:
    made_image(mode="RGBA").save("in.png")
    refused("in.png", "in.png", "transparent")
    refused(made_image(mode="LA"), "transparent")
    made_image(mode="L").save("gray.png", transparency=0)
    refused("gray.png", "gray.png", "transparent")


def test_an_animation() -> None:
    for name in ("in.gif", "in.webp", "in.png", "in.tiff"):
        options = {} if name == "in.tiff" else {"duration": 100}
        made_image().save(name, save_all=True, append_images=[made_image(mode="L").convert("RGB")], **options)
        refused(name, name, "2 frames")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, data: bytes) -> bytes:
    """A PNG of red, green and blue whose rows are not filtered."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_gray_image_of_more_than_eight_bits() -> None:
    values = np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) * 40
    for name, image in (
        ("in.png", values),
        ("in.tiff", values.astype(np.int32)),
        ("f.tiff", values.astype(np.float32)),
    ):
        Image.fromarray(image).save(name)
        refused(name, name, "8 bits")


def test_a_color_image_of_sixteen_bits_is_read_by_its_upper_eight() -> None:
    values = np.random.default_rng(4).integers(0, 1 << 16, (32, 48, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    Path("in.png").write_bytes(png(48, 32, 16, rows))
    np.testing.assert_array_equal(given("in.png"), values >> 8)


@pytest.mark.parametrize("side", [10_001, 40_000])
def test_an_image_that_claims_to_be_huge(side: int) -> None:
    """A few bytes of file, of which nothing is unpacked."""
    Path("in.png").write_bytes(png(side, side, 8, bytes(100)))
    refused("in.png", "in.png", "100 million")


def test_an_image_whose_own_size_the_model_cannot_generate(bundle: Path, capsys: Capture) -> None:
    made_image(8500, 16).save("wide.png")
    refuse(capsys, bundle, "--image", "wide.png", named=("width 8496", "8192"))
    made_image(15, 40).save("narrow.png")
    refuse(capsys, bundle, "--image", "narrow.png", named=("narrow.png", "15x40", "16x16"))


def test_metadata_that_is_damaged_does_no_harm(bundle: Path, capsys: Capture) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff")
    made_image().save("in.png", pnginfo=chunks)
    outcome = run(capsys, bundle, "--image", "in.png")
    if outcome.status:
        assert_one_line_error(outcome, "in.png")


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, "nan", "inf"])
def test_impossible_strength(bundle: Path, capsys: Capture, strength: object) -> None:
    made_image().save("in.png")
    refuse(capsys, bundle, "--image", "in.png", "--strength", strength, named=("strength", strength))


def test_a_strength_that_leaves_no_step(bundle: Path, capsys: Capture) -> None:
    made_image().save("in.png")
    refuse(capsys, bundle, "--image", "in.png", "--strength", 1e-20, named=("1e-20", 2))


def test_options_without_an_image(bundle: Path, capsys: Capture) -> None:
    made_image().save("mask.png")
    refuse(capsys, bundle, "--strength", 0.5, named=("--strength", "--image"), status=2)
    refuse(capsys, bundle, "--mask", "mask.png", named=("--mask", "--image"), status=2)
    refuse(capsys, bundle, "--mask-grow", 3, named=("--mask-grow", "--mask"), status=2)


def test_the_limit_is_of_pixels_not_of_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_image, "MAX_PIXELS", 48 * 32)
    made_image().save("in.png")
    assert open_given("in.png", None).image.size == (48, 32)
    assert open_given(made_image(), None).image.size == (48, 32)
