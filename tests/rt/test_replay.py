"""Replaying an image from its metadata: the same image, and what is refused."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from cli_tools import Capture, assert_one_line_error, call_rt, unchanged
from metadata_tools import FORMATS, generate
from PIL import Image, PngImagePlugin

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.images.formats import ImageFormat
from zimage_runtime.images.image_files import encode_image, read_image_info
from zimage_runtime.images.metadata import REPLAY_VERSION


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_replay_generates_the_same_image(bundle: Path, capsys: Capture, suffix: str) -> None:
    path = generate(capsys, bundle, "a 🦊,\n“red”", f"image{suffix}")
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", path, "-o", f"again{suffix}", "--quiet")
    assert (outcome.lines, outcome.err) == ([f"again{suffix}"], "")
    assert Path(f"again{suffix}").read_bytes() == path.read_bytes()


def test_replay_of_a_jpeg_as_png_is_what_was_generated(bundle: Path, capsys: Capture) -> None:
    png = generate(capsys, bundle, "a fox", "original.png")
    jpeg = generate(capsys, bundle, "a fox", "image.jpg")
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", jpeg, "--quiet")
    assert outcome.lines == ["zimage-7.png"]
    assert Path("zimage-7.png").read_bytes() == png.read_bytes()


def test_replay_of_one_of_several(bundle: Path, capsys: Capture) -> None:
    generate(capsys, bundle, "a fox", "cat.png", "-n", 2)
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", "cat-8.png", "-o", "again.png", "--quiet")
    assert outcome.status == 0
    assert Path("again.png").read_bytes() == Path("cat-8.png").read_bytes()


def refuse_replay(capsys: Capture, bundle: Path, path: Path, *named: object) -> None:
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", "-m", bundle, "--replay", path, "--quiet")
    assert_one_line_error(outcome, path, *named)


def test_replay_of_a_missing_file(bundle: Path, capsys: Capture) -> None:
    refuse_replay(capsys, bundle, Path("cat.png"), "no such file")


def test_replay_of_a_folder(bundle: Path, capsys: Capture) -> None:
    refuse_replay(capsys, bundle, bundle)


@pytest.mark.parametrize("data", [b"", b"a fox", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP"])
def test_replay_of_what_is_no_image(bundle: Path, capsys: Capture, data: bytes) -> None:
    Path("cat.png").write_bytes(data)
    refuse_replay(capsys, bundle, Path("cat.png"))


@pytest.mark.parametrize("suffix", [*FORMATS, ".gif"])
def test_replay_of_an_image_without_metadata(bundle: Path, capsys: Capture, suffix: str) -> None:
    path = Path(f"holiday{suffix}")
    Image.new("RGB", (48, 32)).save(path)
    refuse_replay(capsys, bundle, path)


def write_png(path: Path, document: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("zimage", document)
    Image.new("RGB", (16, 16)).save(path, pnginfo=chunks)


@pytest.mark.parametrize(
    "change",
    [
        {"version": REPLAY_VERSION + 1},
        {"version": "1"},
        {"prompt": None},
        {"prompt": ["a fox"]},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 7.5},
        {"seed": True},
        {"width": "48"},
        {"width": 0},
        {"width": 47},
        {"height": 2**62},
        {"steps": 0},
        {"steps": 1000},
        {"model": ""},
        {"fingerprint": 5},
        {"executor": None},
    ],
)
def test_replay_of_a_document_with_a_wrong_value(bundle: Path, capsys: Capture, change: dict[str, object]) -> None:
    info = read_image_info(generate(capsys, bundle, "a fox", "image.png"))
    write_png(Path("changed.png"), json.dumps({**json.loads(info.replay()), **change}))
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", "-m", bundle, "--replay", "changed.png", "--quiet")
    assert_one_line_error(outcome, next(iter(change)))


@pytest.mark.parametrize("document", ["{", "null", "[]", "7", "{}", "[" * 100_000, '{"version": 1' + "0" * 5000 + "}"])
def test_replay_of_a_damaged_document(bundle: Path, capsys: Capture, document: str) -> None:
    write_png(Path("damaged.png"), document)
    refuse_replay(capsys, bundle, Path("damaged.png"))


def test_replay_of_a_prompt_that_is_not_unicode(bundle: Path, capsys: Capture) -> None:
    info = read_image_info(generate(capsys, bundle, "a fox", "image.png"))
    write_png(Path("changed.png"), json.dumps({**json.loads(info.replay()), "prompt": "\ud83e"}))
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", "changed.png", "--quiet")
    assert_one_line_error(outcome, "prompt", "UTF-8")


@pytest.mark.deep
def test_replay_of_another_bundles_image(bundle: Path, qwen_bundle: Path, capsys: Capture) -> None:
    path = generate(capsys, bundle, "a fox", "image.png")
    refuse_replay(
        capsys, qwen_bundle, path, Bundle.open(bundle).manifest.name, Bundle.open(qwen_bundle).manifest.name, "-m"
    )


def test_replay_says_what_differs_even_when_quiet(bundle: Path, capsys: Capture) -> None:
    path = generate(capsys, bundle, "a fox", "image.png")
    info = read_image_info(path)
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    other = replace(info, executor="cuda", program="cuda-weight-only", library="onnxruntime 1.2.3")
    Path("other.png").write_bytes(encode_image(pixels, ImageFormat.PNG, other))
    outcome = call_rt(capsys, "run", "--replay", "other.png", "-m", bundle, "--quiet", "-o", "again.png")
    assert outcome.status == 0
    for fact in ("cuda", "cpu", "onnxruntime 1.2.3", version("onnxruntime")):
        assert fact in outcome.err
    same = call_rt(capsys, "run", "--replay", path, "-m", bundle, "--quiet", "-o", "again.png")
    assert (same.status, same.err) == (0, "")


def test_metadata_of_a_stranger_does_not_control_the_terminal(bundle: Path, capsys: Capture) -> None:
    path = generate(capsys, bundle, "a fox", "image.png")
    info = replace(read_image_info(path), library="\x1b[2J\rnothing\nis wrong")
    with Image.open(path) as image:
        Path("other.png").write_bytes(encode_image(image.convert("RGB"), ImageFormat.PNG, info))
    outcome = call_rt(capsys, "run", "--replay", "other.png", "-m", bundle, "--quiet", "-o", "again.png")
    assert outcome.status == 0
    (line,) = outcome.err.removesuffix("\n").split("\n")
    assert "is wrong" in line
    assert line.isprintable()
