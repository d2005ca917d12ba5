"""A batch that is killed goes on where it was: the images of an uninterrupted one, and its manifest but for seconds."""

import random
import signal
from pathlib import Path

import pytest
from batch_tools import (
    finished,
    images_in,
    manifest_in,
    rows_of,
    unfinished,
    wait_for,
    without_seconds,
    write_rows,
)
from cli_tools import start

from zimage_rt import demo_bundle
from zimage_rt.batch.store import LATENTS, RECORDS

pytestmark = pytest.mark.deep


def words(rows: Path, out: Path) -> tuple[object, ...]:
    return ("batch", rows, "-m", demo_bundle(), "-o", out, "--executor", "cpu", "--quiet")


def progress(out: Path) -> int:
    """How much there is in the folder."""
    return sum(len(list((out / name).glob("*"))) for name in (RECORDS, LATENTS, ""))


def kill_after(rows: Path, out: Path, more: int) -> None:
    """Kills a batch when so many more files have come."""
    before, process = progress(out), start("zimage-rt", *words(rows, out))
    wait_for(lambda: process.poll() is not None or progress(out) >= before + more, "progress")
    process.kill()
    outcome = finished(process)
    assert outcome.status == -signal.SIGKILL, f"it ended before it was killed: {outcome.err}"


def check(folder: Path, number: int, kills: int, **values: object) -> None:
    rows = write_rows(folder / "rows.jsonl", rows_of(number, **values))
    out, reference = folder / "out", folder / "reference"
    assert finished(start("zimage-rt", *words(rows, reference))).status == 0
    chance = random.Random(number)
    for _ in range(kills):
        kill_after(rows, out, chance.randint(1, 2 * number // kills))
    assert not (out / "manifest.parquet").exists()
    outcome = finished(start("zimage-rt", *words(rows, out)))
    assert outcome.status == 0, outcome.err
    assert images_in(out) == images_in(reference)
    assert len(images_in(out)) == number
    assert without_seconds(manifest_in(out)) == without_seconds(manifest_in(reference))
    assert unfinished(out) == []


def test_ctrl_c_ends_in_one_line(tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(40, size="128x128", steps=50)), tmp_path / "out"
    process = start("zimage-rt", *words(rows, out))
    wait_for(lambda: bool(progress(out)), "latents")
    process.send_signal(signal.SIGINT)
    outcome = finished(process)
    assert (outcome.status, outcome.out, outcome.err.strip()) == (128 + signal.SIGINT, "", "interrupted")
    assert [name for name in unfinished(out) if ".part" in name] == []


def test_a_few_rows_killed_twice(tmp_path: Path) -> None:
    check(tmp_path, 12, 2)


@pytest.mark.slow
def test_four_hundred_rows_killed_ten_times(tmp_path: Path) -> None:
    check(tmp_path, 400, 10, size="64x64", steps=4)
