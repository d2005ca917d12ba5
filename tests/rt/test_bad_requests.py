"""Requests that cannot be generated: one line that names the value and what would do, and nothing written."""

import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_tools import Capture, Outcome, assert_one_line_error, call_rt, finish, start, unchanged

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.executors.ort import cpu_plan as memory
from zimage_runtime.executors.protocol import Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.tokenizer import PromptTokenizer

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    return


def request(capsys: Capture, bundle: Path, *options: object, size: str = "32x32", steps: int = 1) -> Outcome:
    sizes = () if "--size" in options else ("--size", size)
    count = () if "--steps" in options else ("--steps", steps)
    with unchanged(Path()):
        return call_rt(capsys, "run", "a fox", "-m", bundle, *sizes, *count, "--quiet", *options)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ("100x64", ("width", "100", "16", "try 96")),
        ("64x100", ("height", "100", "16", "try 96")),
        ("0x64", ("width", "0", "16")),
        ("64x0", ("height", "0")),
        ("-16x64", ("width", "-16")),
        ("64x-16", ("height", "-16")),
        ("8x8", ("width", "8", "try 16")),
        ("8208x16", ("width", "8208", "8192")),
        ("16x8208", ("height", "8208", "8192")),
        ("99999999999999999x16", ("width", "99999999999999999", "try 8192")),
    ],
)
def test_size_that_the_model_cannot_generate(bundle: Path, capsys: Capture, size: str, named: tuple[str, ...]) -> None:
    assert_one_line_error(request(capsys, bundle, "--size", size), *named)


@pytest.mark.parametrize("size", ["large", "64", "64x", "x64", "64x64x64", "64.0x64", "64 x 64", "", "9" * 40 + "x16"])
def test_size_that_is_none(bundle: Path, capsys: Capture, size: str) -> None:
    assert_one_line_error(request(capsys, bundle, "--size", size), "1024x768", status=2)


@pytest.mark.parametrize("steps", [0, -1, 257, 10**30])
def test_impossible_number_of_steps(bundle: Path, capsys: Capture, steps: int) -> None:
    assert_one_line_error(request(capsys, bundle, "--steps", steps), "steps", 256, steps)


@pytest.mark.parametrize(("seed", "count"), [(-1, 1), (2**64, 1), (2**64 - 1, 2), (2**64 - 3, 4), (10**40, 1), (-1, 2)])
def test_seed_out_of_range(bundle: Path, capsys: Capture, seed: int, count: int) -> None:
    assert_one_line_error(request(capsys, bundle, "--seed", seed, "-n", count), seed, 2**64 - 1)


def test_largest_seed_is_generated(bundle: Path, capsys: Capture) -> None:
    outcome = call_rt(
        *(capsys, "run", "a fox", "-m", bundle, "--size", "32x32", "--steps", 1, "--quiet"),
        *("--seed", 2**64 - 2, "-n", 2),
    )
    assert outcome.lines == [f"zimage-{2**64 - 2}.png", f"zimage-{2**64 - 1}.png"]


@pytest.mark.parametrize("count", [0, -1, 10**10, 2**64])
def test_impossible_number_of_images(bundle: Path, capsys: Capture, count: int) -> None:
    assert_one_line_error(request(capsys, bundle, "-n", count), count, status=2)


@pytest.mark.parametrize(("option", "value"), [("--seed", "seven"), ("--steps", "8.5"), ("--executor", "abacus")])
def test_option_of_the_wrong_kind(bundle: Path, capsys: Capture, option: str, value: str) -> None:
    assert_one_line_error(request(capsys, bundle, option, value), option, value, status=2)


def test_unknown_option(bundle: Path, capsys: Capture) -> None:
    assert_one_line_error(request(capsys, bundle, "--cfg", "7"), "--cfg", "--help", status=2)


def sizes_in(text: str) -> list[str]:
    """The sizes of images that a text names, in order."""
    return re.findall(r"\d+x\d+", text)


@pytest.mark.parametrize("available", [GIB, 300 << 20, 200 << 20])
def test_more_memory_than_there_is(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, available: int
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: available)
    line = assert_one_line_error(request(capsys, bundle, size="8192x4096"), "8192x4096", "GiB")
    asked, largest = sizes_in(line)
    assert asked == "8192x4096"
    width, height = map(int, largest.split("x"))
    larger = f"{width + 16}x{round((width + 16) / 2 / 16) * 16}"
    assert sizes_in(assert_one_line_error(request(capsys, bundle, size=larger), larger)) == [larger, largest]
    # what it names is accepted, and really generated where that takes no minutes
    if width <= 512:
        outcome = call_rt(capsys, "run", "x", "-m", bundle, "--size", largest, "--steps", 1, "--quiet", "-o", "a.png")
        assert outcome.lines == ["a.png"]
    else:
        from zimage_runtime.pipeline import Pipeline, Request

        pipeline = Pipeline.from_bundle(bundle)
        pipeline.run(pipeline.prepare(Request("x", size=(width, height), steps=1)))


@pytest.mark.parametrize("size", ["16x8192", "8192x16", "1024x1024"])
def test_narrow_images_get_a_size_that_fits_too(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 172 << 20)
    asked, largest = sizes_in(assert_one_line_error(request(capsys, bundle, size=size), size))
    assert asked == size
    smaller, larger = ([int(side) for side in one.split("x")] for one in (largest, asked))
    assert smaller != larger
    assert all(side <= limit for side, limit in zip(smaller, larger, strict=True))


def test_low_memory_fits_more(bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    geometry = image_geometry(32, 32, opened.manifest.config)
    tokens = len(PromptTokenizer(opened.file(opened.manifest.tokenizer)).encode("a fox"))
    work = Work(geometry=geometry, tokens=tokens)
    least = memory.plan_memory(opened.manifest, work, low_memory=True, available=1 << 60).peak
    monkeypatch.setattr(memory, "available_memory", lambda: least)
    assert_one_line_error(request(capsys, bundle), "32x32", "--low-memory")
    outcome = call_rt(
        *(capsys, "run", "a fox", "-m", bundle, "--size", "32x32", "--steps", 1, "--quiet", "--low-memory"),
        *("-o", "cat.png"),
    )
    assert (outcome.lines, outcome.err) == (["cat.png"], "")


def test_no_size_fits(bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    line = assert_one_line_error(request(capsys, bundle), "32x32", "bundle")
    assert sizes_in(line) == ["32x32"], "no other size is named"
    assert "--low-memory" not in line


def test_prompt_that_is_not_utf8(bundle: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        process = start("zimage-rt", "run", b"caf\xe9", "-m", bundle, "--size", "32x32", "--quiet", cwd=tmp_path)
        outcome = finish(process)
    assert_one_line_error(outcome, "prompt", "UTF-8")


@pytest.mark.parametrize("name", ["cat", "cat.gif", "cat.png.txt", "cat.", ".png", "", "cat.tiff"])
def test_output_that_is_no_image_format(bundle: Path, capsys: Capture, name: str) -> None:
    assert_one_line_error(request(capsys, bundle, "-o", name), name or ".", ".png", ".jpg", ".webp")


def test_output_folder_that_does_not_exist(bundle: Path, capsys: Capture) -> None:
    assert_one_line_error(request(capsys, bundle, "-o", "new/cat.png"), "new/cat.png:", "folder new")


def test_output_that_is_a_folder(bundle: Path, capsys: Capture) -> None:
    Path("cat.png").mkdir()
    assert_one_line_error(request(capsys, bundle, "-o", "cat.png"), "cat.png", "folder")


def test_output_below_a_file(bundle: Path, capsys: Capture) -> None:
    Path("file").write_text("")
    assert_one_line_error(request(capsys, bundle, "-o", "file/cat.png"), "file/cat.png")


@pytest.mark.parametrize("named", [True, False])
def test_read_only_folder(bundle: Path, tmp_path: Path, capsys: Capture, named: bool) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    try:
        os.chdir(folder if not named else tmp_path)
        options = ("-o", folder / "cat.png") if named else ()
        # refused before it is generated: 256 steps of a large image would take minutes
        outcome = request(capsys, bundle, *options, size="2048x2048", steps=256)
        assert_one_line_error(outcome, folder)
    finally:
        os.chdir(tmp_path)
        subprocess.run(["umount", folder], check=True)


def test_folder_that_takes_no_files(bundle: Path, capsys: Capture) -> None:
    outcome = call_rt(
        *(capsys, "run", "a fox", "-m", bundle, "--size", "32x32", "--steps", 1, "--quiet"), "-o", "/proc/cat.png"
    )
    assert_one_line_error(outcome, "/proc/cat.png")


def test_name_that_the_file_system_refuses(bundle: Path, capsys: Capture) -> None:
    name = "a" * 300 + ".png"
    assert_one_line_error(request(capsys, bundle, "-o", name), name)


def test_longest_name_that_the_file_system_takes(bundle: Path, capsys: Capture) -> None:
    name = "a" * 251 + ".png"
    outcome = call_rt(capsys, "run", "a fox", "-m", bundle, "--size", "32x32", "--steps", 1, "--quiet", "-o", name)
    assert (outcome.lines, outcome.err) == ([name], "")


@pytest.mark.parametrize("options", [(), ("-o", "cat.jpg")])
def test_disk_that_is_full(bundle: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    with unchanged(tmp_path):
        process = start(
            *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "128x128", "--seed", 1, "--quiet", *options),
            cwd=tmp_path,
            preexec_fn=limit,
        )
        outcome = finish(process)
    assert_one_line_error(outcome, options[-1] if options else "zimage-1.png", "space")


def test_no_bundle_given_where_none_ships(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from zimage_rt import demo

    monkeypatch.setattr(demo, "_DEMO", tmp_path / "none")
    assert_one_line_error(call_rt(capsys, "run", "a fox"), "-m", "zimage-export build")


def test_no_prompt(bundle: Path, capsys: Capture) -> None:
    assert_one_line_error(call_rt(capsys, "run", "-m", bundle), "PROMPT", "--replay", status=2)


def test_prompt_and_replay(bundle: Path, capsys: Capture) -> None:
    assert_one_line_error(request(capsys, bundle, "--replay", "cat.png"), "PROMPT", "--replay", status=2)


@pytest.mark.parametrize("options", [("--size", "32x32"), ("--steps", 1), ("--seed", 0), ("-n", 2)])
def test_replay_with_what_the_file_decides(bundle: Path, capsys: Capture, options: tuple[object, ...]) -> None:
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", "cat.png", *options)
    assert_one_line_error(outcome, "--replay", "leave", status=2)


def test_no_command_shows_the_help(capsys: Capture) -> None:
    outcome = call_rt(capsys)
    assert outcome.status == 2
    assert "Commands:" in outcome.err
    assert not outcome.err.startswith("error")
