"""Image files that are written, by `zimage-rt run` and from Python: names, formats, stdout and stderr."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, Outcome, call_rt, finish, start, unchanged
from facts import assert_facts, raises_with
from PIL import Image

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import RequestError
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.images.metadata import ImageInfo
from zimage_runtime.images.outputs import save_image, save_images
from zimage_runtime.pipeline import Pipeline


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(capsys: Capture, bundle: Path, *options: object) -> Outcome:
    outcome = call_rt(
        capsys, "run", "a fox", "-m", bundle, "--size", "48x32", "--steps", 1, "--seed", 7, "--quiet", *options
    )
    assert (outcome.status, outcome.err) == (0, "")
    return outcome


def pixels(path: str | Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_default_name_bears_the_seed_and_replaces_nothing(bundle: Path, capsys: Capture) -> None:
    Path("zimage-7.png").write_text("mine")
    assert generate(capsys, bundle).out == "zimage-7-2.png\n"
    assert generate(capsys, bundle).out == "zimage-7-3.png\n"
    assert Path("zimage-7.png").read_text() == "mine"
    assert sorted(os.listdir()) == ["zimage-7-2.png", "zimage-7-3.png", "zimage-7.png"]


def test_random_seed_is_in_the_name(bundle: Path, capsys: Capture) -> None:
    names = set()
    for _ in range(2):
        outcome = call_rt(capsys, "run", "a fox", "-m", bundle, "--size", "16x16", "--steps", 1, "--quiet", "--json")
        (image,) = json.loads(outcome.out)["images"]
        assert image["path"] == f"zimage-{image['seed']}.png"
        names.add(image["path"])
    assert len(names) == 2


def test_named_output_is_replaced(bundle: Path, capsys: Capture) -> None:
    Path("cat.png").write_text("not an image")
    assert generate(capsys, bundle, "-o", "cat.png").out == "cat.png\n"
    assert pixels("cat.png").shape == (32, 48, 3)
    assert os.listdir() == ["cat.png"]


def test_several_images_bear_their_seeds_and_replace_nothing(bundle: Path, capsys: Capture) -> None:
    Path("cat-8.png").write_text("mine")
    outcome = generate(capsys, bundle, "-n", 3, "-o", "cat.png")
    assert outcome.lines == ["cat-7.png", "cat-8-2.png", "cat-9.png"]
    assert Path("cat-8.png").read_text() == "mine"
    for seed, path in zip((7, 8, 9), outcome.lines, strict=True):
        single = generate(capsys, bundle, "--seed", seed, "-o", "single.png")
        assert Path(path).read_bytes() == Path(single.lines[0]).read_bytes()


def test_several_images_without_a_name(bundle: Path, capsys: Capture) -> None:
    assert generate(capsys, bundle, "-n", 2).lines == ["zimage-7.png", "zimage-8.png"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("a.b.png", "PNG")],
)
def test_format_follows_the_extension(bundle: Path, capsys: Capture, name: str, kind: str) -> None:
    generate(capsys, bundle, "-o", name)
    with Image.open(name) as image:
        image.load()
        assert (image.format, image.size, image.mode) == (kind, (48, 32), "RGB")


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_lossy_formats_are_close_to_the_png(bundle: Path, capsys: Capture, name: str) -> None:
    generate(capsys, bundle, "-o", "a.png")
    generate(capsys, bundle, "-o", name)
    difference = np.abs(pixels("a.png").astype(int) - pixels(name).astype(int))
    assert 0 < difference.mean() < 16  # the images are noise; unrelated ones differ by 60


def test_output_in_another_folder(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "new folder").mkdir()
    path = tmp_path / "new folder" / "狐狸 🦊.png"
    assert generate(capsys, bundle, "-o", path).out == f"{path}\n"
    assert path.is_file()


def test_json_is_one_document(bundle: Path, capsys: Capture) -> None:
    document = json.loads(generate(capsys, bundle, "-n", 2, "--json", "-o", "狐狸.png").out)
    assert document["images"] == [{"path": "狐狸-7.png", "seed": 7}, {"path": "狐狸-8.png", "seed": 8}]
    assert document["seconds"] > 0
    assert sorted(os.listdir()) == ["狐狸-7.png", "狐狸-8.png"]


def test_progress_goes_to_stderr(bundle: Path, capsys: Capture) -> None:
    outcome = call_rt(capsys, "run", "a fox", "-m", bundle, "--size", "32x32", "--steps", 2, "--seed", 7)
    assert outcome.out == "zimage-7.png\n"
    assert "generating" in outcome.err
    assert "2/2" in outcome.err


def test_a_path_has_a_line_of_its_own_beside_the_progress(bundle: Path, tmp_path: Path) -> None:
    """Where stdout and stderr are one terminal, the bar gives way to the path."""
    process = start(
        *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "48x32", "--steps", 1, "--seed", 7),
        cwd=tmp_path,
        stderr=subprocess.STDOUT,
    )
    shown = finish(process).out.replace("\r", "\n").split("\n")
    assert any(line.startswith("generating") for line in shown)
    assert "zimage-7.png" in shown


def test_prompt_that_is_cut_is_said(bundle: Path, capsys: Capture) -> None:
    options = ("-m", bundle, "--size", "32x32", "--steps", 1, "--seed", 7)
    outcome = call_rt(capsys, "run", "a" * 600, *options)
    assert outcome.status == 0
    (warning,) = [line for line in outcome.err.splitlines() if "tokens" in line]
    assert_facts(warning, "prompt")
    quiet = call_rt(capsys, "run", "a" * 600, *options, "--quiet").err
    assert quiet.splitlines() == [warning], "a warning is no progress"


@pytest.mark.deep
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_name_that_is_not_text(bundle: Path, tmp_path: Path, locale: str, options: tuple[str, ...]) -> None:
    process = start(
        *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "32x32", "--steps", 1, "--quiet"),
        *("-o", b"caf\xe9.png", *options),
        cwd=tmp_path,
        env={**os.environ, "LC_ALL": locale},
        errors="surrogateescape",
        encoding="utf-8",
    )
    outcome = finish(process)
    assert (outcome.status, outcome.err) == (0, "")
    name = json.loads(outcome.out)["images"][0]["path"] if options else outcome.lines[0]
    assert os.fsencode(name) == b"caf\xe9.png"
    assert os.listdir(os.fsencode(tmp_path)) == [b"caf\xe9.png"]


def test_name_that_the_terminal_cannot_show(bundle: Path, tmp_path: Path) -> None:
    process = start(
        *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "32x32", "--steps", 1, "--quiet", "-o", "狐.png"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    outcome = finish(process)
    assert (outcome.status, outcome.out, outcome.err) == (0, "\\u72d0.png\n", "")
    assert os.listdir(tmp_path) == ["狐.png"]


def info(seed: int, prompt: str = "a fox") -> ImageInfo:
    return ImageInfo(prompt, seed, 48, 32, 8, "Z-Image-Turbo-fp32", "0" * 64, "cpu")


def made(seed: int) -> Image.Image:
    """A plain image whose colour says which one it is."""
    return Image.new("RGB", (48, 32), (seed, 0, 0))


def save(seeds: list[int], path: str | Path, **options: bool) -> list[Path]:
    return save_images([made(seed) for seed in seeds], [info(seed) for seed in seeds], path, **options)


def seed_in(path: str | Path) -> int:
    """The seed that a file's pixels and its metadata both name."""
    recorded = read_image_info(Path(path)).seed
    assert np.abs(pixels(path)[0, 0].astype(int) - (recorded, 0, 0)).max() <= 3  # JPEG and WebP round
    return recorded


@pytest.mark.parametrize("name", ["fox.png", "fox.jpg", "fox.JPEG", "fox.webp", "a.b.png"])
def test_saving_one_image_uses_that_name(name: str) -> None:
    assert save([7], name) == [Path(name)]
    assert seed_in(name) == 7
    assert os.listdir() == [name]
    assert save_image(made(8), info(8), Path(name)) == Path(name)
    assert seed_in(name) == 8


def test_saving_several_images_adds_their_seeds() -> None:
    assert save([7, 9], "a.b.jpg") == [Path("a.b-7.jpg"), Path("a.b-9.jpg")]
    assert [seed_in(path) for path in sorted(os.listdir())] == [7, 9]
    assert save([], "none.png") == []


@pytest.mark.parametrize("name", ["out", "out/", "out.png", "new/", "two/new/"])
@pytest.mark.parametrize("seeds", [[7], [7, 8]])
def test_saving_in_a_folder(name: str, seeds: list[int]) -> None:
    """An existing one, or one that a separator at the end of the name asks for."""
    for existing in ("out", "out.png"):
        Path(existing).mkdir()
    assert save(seeds, name) == [Path(name) / f"zimage-{seed}.png" for seed in seeds]
    assert [seed_in(Path(name) / f"zimage-{seed}.png") for seed in seeds] == seeds


def test_saving_replaces_files_or_keeps_them() -> None:
    save([7, 8], "fox.png")
    Path("fox-7.png").write_bytes(b"mine")
    assert save([7, 8], "fox.png", overwrite=False) == [Path("fox-7-2.png"), Path("fox-8-2.png")]
    assert save([7], "fox-7.png", overwrite=False) == [Path("fox-7-3.png")]
    assert Path("fox-7.png").read_bytes() == b"mine"
    assert save([7], "fox-7.png") == [Path("fox-7.png")]
    assert seed_in("fox-7.png") == 7
    assert len(os.listdir()) == 5


def test_images_of_one_seed_do_not_replace_each_other() -> None:
    paths = save_images([made(7), made(7)], [info(7, "a fox"), info(7, "a hen")], "out.png")
    assert paths == [Path("out-7.png"), Path("out-7-2.png")]
    assert [read_image_info(path).prompt for path in paths] == ["a fox", "a hen"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_saving_without_metadata(suffix: str) -> None:
    (path,) = save([7], f"fox{suffix}", metadata=False)
    assert b"a fox" not in path.read_bytes()
    with raises_with(RequestError, path, "metadata"):
        read_image_info(path)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("fox.gif", "fox.gif"),
        ("fox", "extension"),
        ("missing/fox.png", "missing"),
        ("file/", "file"),
        ("file/fox.png", "file"),
        ("fox\0.png", "fox"),
        ("fox\ud800.png", "fox"),
        (b"fox.png", "fox"),
    ],
)
def test_places_where_nothing_can_be_saved(name: Any, named: str) -> None:
    Path("file").write_bytes(b"mine")
    with unchanged(Path()), raises_with(RequestError, named):
        save([7, 8], name)


def test_nothing_is_saved_if_one_image_cannot_be() -> None:
    with unchanged(Path()), raises_with(RequestError, "prompt", "PNG"):
        save_images([made(7), made(8)], [info(7), info(8, "x" * 40_000)], "fox.jpg")


def test_a_file_that_cannot_be_written_is_named() -> None:
    with unchanged(Path()), raises_with(OSError, "a" * 300 + ".png") as caught:
        save([7], "a" * 300 + ".png")
    assert caught.value.filename == "a" * 300 + ".png"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_what_is_saved_from_python_can_be_replayed(bundle: Path, capsys: Capture, suffix: str) -> None:
    result = Pipeline.from_bundle(bundle).generate("a fox", size=(48, 32), steps=1, seed=7, count=2)
    manifest = Bundle.open(bundle).manifest
    recorded = [
        ImageInfo("a fox", seed, 48, 32, 1, manifest.name, manifest.fingerprint, "cpu") for seed in result.seeds
    ]
    _, second = save_images(result.images, recorded, f"fox{suffix}")
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", second, "-o", "again.png", "--quiet")
    assert (outcome.status, outcome.lines) == (0, ["again.png"])
    np.testing.assert_array_equal(pixels("again.png"), np.asarray(result.images[1]))
