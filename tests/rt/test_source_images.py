"""`run --image`: what it writes about the image that it started from, and what it refuses, in one line."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, Outcome, assert_one_line_error, call_rt, unchanged
from PIL import Image, PngImagePlugin

from zimage_runtime.images import source_image
from zimage_runtime.images.image_files import read_image_info


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


def drawn(capsys: Capture, bundle: Path, *options: object) -> Any:
    outcome = run(capsys, bundle, *options)
    assert (outcome.status, outcome.err) == (0, "")
    with Image.open("out.png") as image:
        return np.asarray(image)


def test_what_was_started_from_is_recorded_and_replayed(bundle: Path, capsys: Capture) -> None:
    made_image().save("in.png")
    made_image(mode="L").save("mask.png")
    drawn(capsys, bundle, "--image", "in.png", "--mask", "mask.png", "--strength", 0.6)
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
        (("--image", "in.png", "--mask", "in.png"), ("in.png", "pixels differ")),
    ):
        with unchanged(Path()):
            outcome = call_rt(capsys, *replay, *options)
        # the size is the recorded one, so a mask that fits it is taken, and the hashes tell
        assert_one_line_error(outcome, *(named if options[:2] != ("--image", "other.png") else ("other.png", "differ")))
    outcome = call_rt(capsys, *replay, "--image", "in.png", "--mask", "mask.png", "--strength", 0.6)
    assert_one_line_error(outcome, "--strength", status=2)


def test_replay_of_an_image_from_a_prompt_alone_takes_no_image(bundle: Path, capsys: Capture) -> None:
    made_image().save("in.png")
    drawn(capsys, bundle, "--size", "48x32")
    outcome = call_rt(capsys, "run", "--replay", "out.png", "-m", bundle, "--quiet", "--image", "in.png")
    assert_one_line_error(outcome, "out.png", "--image", "leave it out")


def test_size_is_the_images_own_cut_to_multiples_of_16_or_the_one_given(bundle: Path, capsys: Capture) -> None:
    made_image(63, 49).save("in.png")
    assert drawn(capsys, bundle, "--image", "in.png").shape == (48, 48, 3)
    assert drawn(capsys, bundle, "--image", "in.png", "--size", "32x64").shape == (64, 32, 3)


def test_an_image_is_turned_upright(bundle: Path, capsys: Capture) -> None:
    upright = made_image()
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it"
    upright.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    upright.save("upright.png")
    expected = drawn(capsys, bundle, "--image", "upright.png")
    np.testing.assert_array_equal(drawn(capsys, bundle, "--image", "turned.png"), expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_other_kinds_of_images_are_taken(bundle: Path, capsys: Capture, mode: str) -> None:
    """An alpha channel that hides nothing is dropped."""
    name = "in.tiff" if mode == "CMYK" else "in.png"
    made_image().convert(mode).save(name)
    assert drawn(capsys, bundle, "--image", name).shape == (32, 48, 3)
    assert np.array_equal(
        drawn(capsys, bundle, "--image", name), drawn(capsys, bundle, "--image", save_rgb(Image.open(name)))
    )


def save_rgb(image: Image.Image) -> Path:
    image.convert("RGB").save("rgb.png")
    return Path("rgb.png")


def test_a_photograph_with_a_second_image_inside_is_no_animation(bundle: Path, capsys: Capture) -> None:
    made_image().save("phone.jpg", "MPO", save_all=True, append_images=[made_image(24, 16)])
    with Image.open("phone.jpg") as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("MPO", 2)
    assert drawn(capsys, bundle, "--image", "phone.jpg").shape == (32, 48, 3)


def test_images_that_are_none(bundle: Path, capsys: Capture) -> None:
    Path("text.png").write_text("a fox")
    Path("empty.png").write_bytes(b"")
    Path("folder").mkdir()
    refuse(capsys, bundle, "--image", "text.png", named=("text.png", "not an image"))
    refuse(capsys, bundle, "--image", "empty.png", named=("empty.png", "not an image"))
    refuse(capsys, bundle, "--image", "folder", named=("folder", "directory"))
    refuse(capsys, bundle, "--image", "gone.png", named=("gone.png", "no such file"))
    made_image().save("in.png")
    refuse(capsys, bundle, "--image", "in.png", "--mask", "text.png", named=("text.png", "not an image"))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_an_image_that_is_cut_off(bundle: Path, capsys: Capture, suffix: str) -> None:
    path = Path(f"in{suffix}")
    made_image().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refuse(capsys, bundle, "--image", path, named=(path, "damaged"))


def test_an_image_with_transparent_parts(bundle: Path, capsys: Capture) -> None:
    made_image(mode="RGBA").save("in.png")
    refuse(capsys, bundle, "--image", "in.png", named=("in.png", "transparent"))
    made_image(mode="L").save("gray.png", transparency=0)
    refuse(capsys, bundle, "--image", "gray.png", named=("gray.png", "transparent"))


def test_an_animation(bundle: Path, capsys: Capture) -> None:
    for name in ("in.gif", "in.webp", "in.png"):
        made_image().save(name, save_all=True, append_images=[made_image(mode="L").convert("RGB")], duration=100)
        refuse(capsys, bundle, "--image", name, named=(name, "2 frames"))


def test_an_image_of_sixteen_bits(bundle: Path, capsys: Capture) -> None:
    Image.fromarray(np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) * 40).save("in.png")
    refuse(capsys, bundle, "--image", "in.png", named=("in.png", "8 bits"))


@pytest.mark.parametrize("side", [10_001, 40_000])
def test_an_image_that_claims_to_be_huge(bundle: Path, capsys: Capture, side: int) -> None:
    """A few bytes of file, of which nothing is unpacked."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    Path("in.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    refuse(capsys, bundle, "--image", "in.png", named=("in.png", "100 million"))


def test_an_image_whose_own_size_the_model_cannot_draw(bundle: Path, capsys: Capture) -> None:
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
    refuse(capsys, bundle, "--image", "in.png", "--strength", 1e-20, named=("1e-20", "none of 2 steps"))


def test_a_mask_of_another_size(bundle: Path, capsys: Capture) -> None:
    made_image(96, 64).save("in.png")
    made_image(64, 64, "L").save("mask.png")
    named = ("mask.png", "64x64", "96x64", "the image's size")
    refuse(capsys, bundle, "--image", "in.png", "--mask", "mask.png", named=named)
    # one of the size that is generated is taken
    assert drawn(
        *(capsys, bundle, "--image", "in.png", "--mask", "mask.png", "--size", "64x64", "--strength", 0.5)
    ).shape == (64, 64, 3)


def test_a_mask_that_keeps_everything(bundle: Path, capsys: Capture) -> None:
    made_image().save("in.png")
    Image.new("L", (48, 32), 100).save("mask.png")
    refuse(capsys, bundle, "--image", "in.png", "--mask", "mask.png", named=("mask.png", "white"))


def test_options_without_an_image(bundle: Path, capsys: Capture) -> None:
    made_image().save("mask.png")
    refuse(capsys, bundle, "--strength", 0.5, named=("--strength", "--image"), status=2)
    refuse(capsys, bundle, "--mask", "mask.png", named=("--mask", "--image"), status=2)


def test_the_limit_is_of_pixels_not_of_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_image, "MAX_PIXELS", 48 * 32)
    made_image().save("in.png")
    assert source_image.open_given("in.png", None).image.size == (48, 32)
    assert source_image.open_given(made_image(), None).image.size == (48, 32)
