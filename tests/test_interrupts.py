"""Commands that are stopped: by Ctrl-C, by a signal, by a reader who has gone. Nothing half-written is left."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_tools import Capture, Outcome, assert_one_line_error, call_export, finish, start, unchanged
from PIL import Image

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import BundleError

pytestmark = pytest.mark.deep

LONG = ("--steps", 256, "--size", "512x512", "--seed", 1)


def start_run(bundle: Path, folder: Path, *options: object) -> "subprocess.Popen[str]":
    return start("zimage-rt", "run", "a lighthouse", "-m", bundle, *options, cwd=folder)


def wait_for_steps(process: "subprocess.Popen[str]") -> str:
    """Reads the progress until a step is done, and returns what was read."""
    assert process.stderr is not None
    read = ""
    while not re.search(r"\b[1-9][0-9]*/256", read):
        piece = os.read(process.stderr.fileno(), 4096).decode(errors="replace")
        assert piece, f"the command ended early: {read}"
        read += piece
    return read


def stop_at_work(bundle: Path, folder: Path, number: signal.Signals) -> Outcome:
    """Sends a signal to a command that is generating, and returns what it left."""
    process = start_run(bundle, folder, *LONG)
    read = wait_for_steps(process)
    process.send_signal(number)
    outcome = finish(process)
    return Outcome(outcome.status, outcome.out, read + outcome.err)


def test_ctrl_c_while_drawing(bundle: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        outcome = stop_at_work(bundle, tmp_path, signal.SIGINT)
    assert outcome.status == 130
    assert outcome.out == ""
    bar, *after = [line for line in outcome.err.splitlines() if line]
    assert bar.startswith("generating")
    assert "256/256" not in outcome.err
    assert [line for line in after if not line.startswith("generating")] == ["interrupted"]
    assert outcome.err.endswith("interrupted\n")


def test_terminated_while_drawing(bundle: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        outcome = stop_at_work(bundle, tmp_path, signal.SIGTERM)
    assert outcome.status == 143
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert "256/256" not in outcome.err


def test_images_drawn_before_an_interrupt_stay_whole(bundle: Path, tmp_path: Path) -> None:
    process = start_run(bundle, tmp_path, "--size", "64x64", "--steps", 8, "--seed", 1, "-n", 10_000, "--quiet")
    assert process.stdout is not None
    paths = [process.stdout.readline().strip() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.status == 130
    paths += outcome.lines
    assert sorted(os.listdir(tmp_path)) == sorted(paths)
    for path in paths:
        with Image.open(tmp_path / path) as image:
            image.load()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_building(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start("zimage-export", "build", checkpoint, tmp_path / "bundle", "--quiet")
    while not os.listdir(tmp_path):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    outcome = finish(process)
    assert "Traceback" not in outcome.err
    if outcome.status == 0:  # it was faster than the signal
        Bundle.open(tmp_path / "bundle").verify()
    else:
        assert outcome.status == 128 + number
        assert os.listdir(tmp_path) == []


def test_killed_while_building(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    """Killed twenty times at random moments, from the first byte to the replacement of an older bundle."""
    target = tmp_path / "bundle"
    moments = random.Random(0)
    cut_short = 0
    for _ in range(20):
        process = start("zimage-export", "build", checkpoint, target, "--force", "--quiet")
        before = set(os.listdir(tmp_path))
        while not set(os.listdir(tmp_path)) - before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        process.communicate()
        cut_short += process.returncode == -signal.SIGKILL
        if target.exists():  # a whole bundle, of this build or of one before
            Bundle.open(target).verify()
        for name in set(os.listdir(tmp_path)) - {"bundle"}:
            with pytest.raises(BundleError):
                Bundle.open(tmp_path / name)
    assert cut_short >= 10, "most builds were done before they were killed"
    outcome = call_export(capsys, "build", checkpoint, target, "--force", "--quiet")
    assert outcome.status == 0, outcome.err
    Bundle.open(target).verify()
    assert os.listdir(tmp_path) == ["bundle"]


def test_bundle_set_aside_by_a_killed_build_is_not_left(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f".bundle.{gone.pid}-0123abcd.old").mkdir()
    outcome = call_export(capsys, "build", checkpoint, tmp_path / "bundle", "--quiet")
    assert outcome.status == 0, outcome.err
    assert os.listdir(tmp_path) == ["bundle"]


def test_leftovers_of_a_build_that_still_runs_are_spared(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / f".bundle.{os.getpid()}-0123abcd.part").mkdir()
    assert call_export(capsys, "build", checkpoint, tmp_path / "bundle", "--quiet").status == 0
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("options", [(), ("--json",), ("-n", 3)])
def test_reader_of_stdout_has_gone(bundle: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    reader, writer = os.pipe()
    process = start(
        *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "64x64", "--steps", 1, "--quiet", *options),
        cwd=tmp_path,
        stdout=writer,
    )
    os.close(writer)
    os.close(reader)
    outcome = finish(process)
    assert outcome.err == ""
    assert outcome.status == 1
    assert len(os.listdir(tmp_path)) == 1  # what was generated before anyone knew
    assert not os.listdir(tmp_path)[0].startswith(".")


@pytest.mark.parametrize("stream", [1, 2])
def test_closed_stream(bundle: Path, tmp_path: Path, stream: int) -> None:
    process = start(
        *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "64x64", "--steps", 1, "--seed", 3),
        cwd=tmp_path,
        preexec_fn=lambda: os.close(stream),
    )
    outcome = finish(process)
    assert outcome.status == 0
    assert "Traceback" not in outcome.err
    assert outcome.out == ("" if stream == 1 else "zimage-3.png\n")
    assert os.listdir(tmp_path) == ["zimage-3.png"]


def test_error_with_stderr_closed_stays_off_stdout(tmp_path: Path) -> None:
    process = start("zimage-rt", "run", "a fox", "-m", tmp_path / "nowhere", preexec_fn=lambda: os.close(2))
    assert finish(process) == Outcome(1, "", "")


def test_stdout_on_a_full_disk(bundle: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(
            *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "64x64", "--steps", 1, "--quiet"),
            cwd=tmp_path,
            stdout=full,
        )
        outcome = finish(process)
    assert_one_line_error(outcome, "no space left")
