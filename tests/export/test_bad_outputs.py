"""Places where a bundle cannot be written: one line that names the place, and what is there stays as it is."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_tools import Capture, assert_one_line_error, call_export, finish, start, unchanged

from zimage_runtime.bundle.bundle import Bundle


def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own at `folder`, for the time of a test."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds half of the bundle."""
    yield from mounted(tmp_path / "small", "size=3m")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "read-only", "size=1m,ro")


def test_existing_output_without_force(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bundle").mkdir()
    with unchanged(tmp_path):
        outcome = call_export(capsys, "build", checkpoint, tmp_path / "bundle", "--quiet")
    assert_one_line_error(outcome, tmp_path / "bundle", "--force")


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"format": "other"}', "[" * 100_000])
def test_force_spares_a_folder_that_is_no_bundle(
    checkpoint: Path, tmp_path: Path, capsys: Capture, manifest: str | None
) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "holiday.jpg").write_bytes(b"dear")
    if manifest is not None:
        (target / "manifest.json").write_text(manifest)
    with unchanged(tmp_path):
        outcome = call_export(capsys, "build", checkpoint, target, "--force", "--quiet")
    assert_one_line_error(outcome, target, "bundle")


def test_force_spares_a_file(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("dear")
    with unchanged(tmp_path):
        outcome = call_export(capsys, "build", checkpoint, target, "--force", "--quiet")
    assert_one_line_error(outcome, target, "bundle")


def test_force_spares_a_link_and_what_it_points_to(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(bundle, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with unchanged(tmp_path):
        outcome = call_export(capsys, "build", checkpoint, tmp_path / "link", "--force", "--quiet")
    assert_one_line_error(outcome, tmp_path / "link")


def test_force_replaces_a_bundle(checkpoint: Path, bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    target = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (target / "vae/weights.safetensors").unlink()
    (target / "extra.txt").write_text("of the old bundle")
    outcome = call_export(capsys, "build", checkpoint, target, "--force", "--quiet")
    assert (outcome.status, outcome.lines, outcome.err) == (0, [str(target)], "")
    Bundle.open(target).verify()
    assert not (target / "extra.txt").exists()
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("name", [".", "../here", ""])
def test_current_folder_is_not_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with unchanged(tmp_path):
        outcome = call_export(capsys, "build", checkpoint, name, "--force", "--quiet")
    assert_one_line_error(outcome, name or ".", "current folder")


def test_bad_checkpoint_spares_the_bundle_that_force_would_replace(
    bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    with unchanged(tmp_path):
        outcome = call_export(capsys, "build", tmp_path / "nowhere", target, "--force", "--quiet")
    assert_one_line_error(outcome, tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["file/bundle", "file/new/bundle"])
def test_output_below_a_file(checkpoint: Path, tmp_path: Path, capsys: Capture, place: str) -> None:
    (tmp_path / "file").write_text("")
    with unchanged(tmp_path):
        outcome = call_export(capsys, "build", checkpoint, tmp_path / place, "--quiet")
    assert_one_line_error(outcome, tmp_path / "file")


def test_read_only_output(checkpoint: Path, read_only_disk: Path, capsys: Capture) -> None:
    outcome = call_export(capsys, "build", checkpoint, read_only_disk / "bundle", "--quiet")
    # the free space of an empty disk is checked before it is found to be read-only
    assert_one_line_error(outcome, read_only_disk / "bundle")
    assert os.listdir(read_only_disk) == []


def test_disk_known_to_be_too_small(checkpoint: Path, small_disk: Path, capsys: Capture) -> None:
    outcome = call_export(capsys, "build", checkpoint, small_disk / "new" / "bundle", "--quiet")
    assert_one_line_error(outcome, small_disk / "new" / "bundle", "space")
    assert os.listdir(small_disk) == []


def test_disk_that_fills_up_midway(
    checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plenty = SimpleNamespace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    outcome = call_export(capsys, "build", checkpoint, small_disk / "new" / "bundle", "--quiet")
    assert_one_line_error(outcome, small_disk / "new" / "bundle", "space")
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("force", [False, True])
def test_write_that_fails_midway(checkpoint: Path, bundle: Path, tmp_path: Path, force: bool) -> None:
    target = tmp_path / "bundle"
    if force:
        shutil.copytree(bundle, target)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    with unchanged(tmp_path):
        options = ["--force"] if force else []
        process = start("zimage-export", "build", checkpoint, target, "--quiet", *options, preexec_fn=limit)
        outcome = finish(process)
    assert_one_line_error(outcome, target, "space")


def test_synthesize_refuses_an_existing_folder(tmp_path: Path, capsys: Capture) -> None:
    with unchanged(tmp_path):
        outcome = call_export(capsys, "synthesize", tmp_path, "--quiet")
    assert_one_line_error(outcome, tmp_path)
