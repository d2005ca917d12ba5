"""`zimage-rt batch` on one machine: the images of `run`, all rows checked first, and work that is never done twice."""

import contextlib
import functools
import json
import os
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_tools import (
    call_batch,
    images_in,
    manifest_in,
    rows_of,
    unfinished,
    without_seconds,
    write_rows,
)
from cli_tools import Capture, assert_one_line_error, call_rt, finish, start
from facts import assert_facts, has_fact
from PIL import Image

from zimage_rt.batch import generate
from zimage_rt.batch.records import remove_records, spooled
from zimage_rt.batch.store import LATENTS, FolderStore
from zimage_runtime.errors import ExecutorError
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.model.programs import Program
from zimage_runtime.stages import Stages


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that ran, in order."""
    found: list[Program] = []
    run = HostPrograms.run

    def running(one: HostPrograms, program: Program, *rest: Any) -> Any:
        found.append(program)
        return run(one, program, *rest)

    monkeypatch.setattr(HostPrograms, "run", running)
    return found


def test_images_are_those_of_run(bundle: Path, tmp_path: Path, capsys: Capture, ran: list[Program]) -> None:
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / "in.png")
    base = {"steps": 2, "size": "48x32"}
    rows = [
        {"id": "a", "prompt": "a fox", "seed": 1, **base},
        {"id": "b", "prompt": "a hen", "seed": 2, **base, "size": "32x32"},
        {"id": "c", "prompt": "a fox", "seed": 3, **base, "cfg_scale": 2.0, "negative": "a hen"},
        {"id": "d", "prompt": "a fox", "seed": 4, **base, "image": "in.png", "strength": 0.7, "sampler": "heun"},
        {"id": "e", "prompt": "a fox", "seed": 5, **base},
    ]
    out = tmp_path / "new" / "out"
    outcome = call_batch(capsys, bundle, write_rows(tmp_path / "rows.jsonl", rows), out)
    assert (outcome.status, outcome.err) == (0, "")
    assert sorted(outcome.lines) == [str(out / f"{row['id']}.png") for row in rows]
    assert Counter(ran)[Program.TEXT_ENCODER] == 2
    for row in rows:
        options = {**row, "image": tmp_path / "in.png"} if "image" in row else dict(row)
        name, prompt = options.pop("id"), options.pop("prompt")
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        single = tmp_path / f"{name}.png"
        ended = call_rt(*(capsys, "run", prompt, "-m", bundle, "-o", single, "--executor", "cpu", "--quiet"), *words)
        assert ended.status == 0, ended.err
        assert single.read_bytes() == (out / single.name).read_bytes()
    found = manifest_in(out)
    assert [one["id"] for one in found] == ["a", "b", "c", "d", "e"]
    for one in found:
        assert read_image_info(out / one["file"]).seed == one["seed"]
        assert one["executor"] == "cpu"
        assert one["seconds"] > 0
        assert one["error"] is None
        assert json.loads(one["request"])["prompt"] in ("a fox", "a hen")
    assert unfinished(out) == []


def test_formats_say_the_same(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = rows_of(3)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    cells = "\n".join(",".join(str(row[name]) for name in rows[0]) for row in rows)
    (tmp_path / "r.csv").write_text(f"{','.join(rows[0])}\n{cells}\n")
    write_rows(tmp_path / "r.jsonl", rows)
    found = []
    for suffix in ("jsonl", "csv", "parquet"):
        assert call_batch(capsys, bundle, tmp_path / f"r.{suffix}", tmp_path / suffix).status == 0
        found.append((images_in(tmp_path / suffix), without_seconds(manifest_in(tmp_path / suffix))))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 3


def test_a_second_time_nothing_is_done(bundle: Path, tmp_path: Path, capsys: Capture, ran: list[Program]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(3))
    out = tmp_path / "out"
    assert call_batch(capsys, bundle, rows, out).status == 0
    before, table = images_in(out), manifest_in(out)
    ran.clear()
    outcome = call_batch(capsys, bundle, rows, out)
    assert (outcome.status, outcome.out, ran) == (0, "", [])
    assert (images_in(out), manifest_in(out)) == (before, table)


def test_only_what_is_asked_for_anew_is_done(bundle: Path, tmp_path: Path, capsys: Capture, ran: list[Program]) -> None:
    """A row whose request changed, one whose image is damaged, one that is new; a row that left may come back."""
    rows, out = rows_of(5), tmp_path / "out"
    path = write_rows(tmp_path / "rows.jsonl", rows[:4])
    assert call_batch(capsys, bundle, path, out).status == 0
    first = images_in(out)
    (out / "row-1.png").write_bytes(first["row-1.png"][:-1])
    changed = {**rows[2], "seed": 99}
    outcome = call_batch(capsys, bundle, write_rows(path, [rows[1], changed, rows[4], rows[0]]), out)
    assert {Path(line).stem for line in outcome.lines} == {"row-1", "row-2", "row-4"}
    second = images_in(out)
    assert second["row-1.png"] == first["row-1.png"]
    assert second["row-2.png"] != first["row-2.png"]
    assert [one["id"] for one in manifest_in(out)] == ["row-1", "row-2", "row-4", "row-0"]
    ran.clear()
    assert call_batch(capsys, bundle, write_rows(path, rows[:2] + rows[3:]), out).lines == []
    assert ran == []
    outcome = call_batch(capsys, bundle, write_rows(path, rows), out)
    assert [Path(line).stem for line in outcome.lines] == ["row-2"]
    assert images_in(out)["row-2.png"] == first["row-2.png"]


def test_no_file_of_others_is_replaced(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "row-1.png").write_text("mine")
    outcome = call_batch(capsys, bundle, write_rows(tmp_path / "rows.jsonl", rows_of(3)), out)
    assert_one_line_error(outcome, out / "row-1.png")
    assert images_in(out) == {"row-1.png": b"mine"}


def test_metadata_can_be_left_out(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(1)), tmp_path / "out"
    assert call_batch(capsys, bundle, rows, out, "--no-metadata").status == 0
    with Image.open(out / "row-0.png") as image:
        assert image.info == {}
    assert len(call_batch(capsys, bundle, rows, out).lines) == 1
    with Image.open(out / "row-0.png") as image:
        assert "zimage" in image.info


# What is wrong is found before anything is generated


def test_poisoned_rows_are_reported_before_the_first_image(
    bundle: Path, tmp_path: Path, capsys: Capture, ran: list[Program]
) -> None:
    good = {"size": "32x32", "steps": 1}
    lines = [
        json.dumps({"id": "ok", "prompt": "a fox", **good}).encode(),
        json.dumps({"id": "size", "prompt": "a fox", "size": "33x32"}).encode(),
        json.dumps({"id": "image", "prompt": "a fox", **good, "image": "none.png"}).encode(),
        json.dumps({"id": "long", "prompt": "x" * 100_000, **good}).encode(),
        json.dumps({"id": "OK", "prompt": "a hen", **good}).encode(),
        b'{"id": "bytes", "prompt": "caf\xe9"}',
        json.dumps({"id": "lora", "prompt": "a fox", **good, "loras": ["none.safetensors"]}).encode(),
        json.dumps({"id": "huge", "prompt": "a fox", "size": "1000000x1000000"}).encode(),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    outcome = call_batch(capsys, bundle, tmp_path / "rows.jsonl", tmp_path / "out")
    assert (outcome.status, outcome.out) == (1, "")
    *bad, last = outcome.err.splitlines()
    facts: list[tuple[object, ...]] = [
        (2, "33"),
        (3, "none.png"),
        (4, 100_000),
        (5, "OK", 1),
        (6, "0xe9"),
        (7, "none.safetensors"),
        (8, 1_000_000),
    ]
    assert len(bad) == len(facts)
    for line, (number, *named) in zip(bad, facts, strict=True):
        assert line.startswith(f"{tmp_path / 'rows.jsonl'}:{number}: ")
        assert_facts(line, *named)
    assert_facts(last, "error:", 7, 8)
    assert ran == []
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_cut_are_said_once(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [*rows_of(2), {**rows_of(1)[0], "id": "long", "prompt": "a fox in the snow " * 60}]
    outcome = call_batch(capsys, bundle, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert outcome.status == 0
    assert_facts(outcome.err.strip(), "rows.jsonl", 3)


def test_options_that_do_not_fit(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(1))
    assert_one_line_error(call_batch(capsys, bundle, rows, tmp_path, "--workers", 2), "--workers", "--ray", status=2)
    outcome = call_batch(capsys, bundle, rows, tmp_path, "--device", 1, "--ray", "local")
    assert_one_line_error(outcome, "--device", "--ray", status=2)
    assert_one_line_error(call_batch(capsys, bundle, rows, "nope://x/y"), "nope://x/y")
    assert_one_line_error(call_batch(capsys, bundle, rows, rows), rows)


@pytest.mark.parametrize(("module", "extra", "options"), [("pyarrow", "batch", ()), ("ray", "ray", ("--ray", "local"))])
def test_what_is_not_installed_is_named(
    bundle: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    extra: str,
    options: tuple[str, ...],
) -> None:
    import sys

    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(1))
    outcome = call_batch(capsys, bundle, rows, tmp_path / "out", *options)
    assert_one_line_error(outcome, f"'zimage-rt[{extra}]'")


# Rows that fail


@contextlib.contextmanager
def no_hens() -> Iterator[None]:
    """Encoding the prompt of a hen fails."""
    states = Stages.hidden_states

    def failing(stages: Stages, session: Any, ids: tuple[int, ...]) -> Any:
        if ids == tuple(stages.token_ids("a hen in the snow")):
            raise ExecutorError("no hens")
        return states(stages, session, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "hidden_states", failing)
        yield


@pytest.fixture
def hen_fails() -> Iterator[None]:
    with no_hens():
        yield


def test_failed_rows_are_listed_and_tried_again(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(6)), tmp_path / "out"
    reference = tmp_path / "reference"
    assert call_batch(capsys, bundle, rows, reference).status == 0
    with no_hens():
        outcome = call_batch(capsys, bundle, rows, out)
    assert outcome.status == 1
    assert len(outcome.lines) == 4
    *listed, last = outcome.err.splitlines()
    for line, number in zip(listed, (2, 5), strict=True):
        assert_facts(line, f"rows.jsonl:{number}:", f"row-{number - 1}", "no hens")
    assert_facts(last, "error:", 2, 6)
    errors = {one["id"]: one["error"] for one in manifest_in(out) if one["error"] is not None}
    assert errors == {"row-1": "no hens", "row-4": "no hens"}
    assert all((one["file"] is None) == (one["error"] is not None) for one in manifest_in(out))
    outcome = call_batch(capsys, bundle, rows, out)
    assert (outcome.status, len(outcome.lines)) == (0, 2)
    assert images_in(out) == images_in(reference)
    assert without_seconds(manifest_in(out)) == without_seconds(manifest_in(reference))


@pytest.mark.usefixtures("hen_fails")
def test_fail_fast(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [rows_of(3)[1], rows_of(3)[0]])
    outcome = call_batch(capsys, bundle, rows, tmp_path / "out", "--fail-fast")
    assert_one_line_error(outcome, "rows.jsonl:1:", "row-1", "no hens")
    assert images_in(tmp_path / "out") == {}


@pytest.mark.usefixtures("hen_fails")
def test_json(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(2))
    outcome = call_batch(capsys, bundle, rows, tmp_path / "out", "--json")
    document = json.loads(outcome.out)
    assert document.pop("seconds") > 0
    assert document == {
        "rows": 2,
        "already_there": 0,
        "generated": 1,
        "failed": [{"line": 2, "id": "row-1", "error": "no hens"}],
        "manifest": str(tmp_path / "out" / "manifest.parquet"),
    }


# Ended at any moment


class Ended(BaseException):
    """The process dies."""


@pytest.mark.parametrize("writes", [1, 3, 5, 7, 9, 11, 12])
def test_a_batch_that_dies_between_two_writes_goes_on(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, writes: int, ran: list[Program]
) -> None:
    """After each image's latents, record and file; no step is taken twice, and no image is decoded twice."""
    rows, out, reference = write_rows(tmp_path / "rows.jsonl", rows_of(4)), tmp_path / "out", tmp_path / "reference"
    assert call_batch(capsys, bundle, rows, reference).status == 0
    whole = Counter(ran)
    ran.clear()
    write, count = FolderStore.write, 0

    def dying(store: FolderStore, name: str, data: bytes, **options: bool) -> None:
        nonlocal count
        if count == writes:
            raise Ended
        count += 1
        write(store, name, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "write", dying)
        with pytest.raises(Ended):
            call_batch(capsys, bundle, rows, out)
    assert not (out / "manifest.parquet").exists()
    assert call_batch(capsys, bundle, rows, out).status == 0
    assert images_in(out) == images_in(reference)
    assert without_seconds(manifest_in(out)) == without_seconds(manifest_in(reference))
    assert unfinished(out) == []
    again = Counter(ran)
    assert again[Program.DENOISER] <= whole[Program.DENOISER] + 2  # of the image whose latents were not written
    assert again[Program.DECODER] <= whole[Program.DECODER] + 1


def test_damaged_records_and_latents_are_as_if_they_were_not_there(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(3)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(generate, "remove_latents", lambda store, key: None)
        patch.setattr("zimage_rt.batch.manifest.remove_records", lambda store, keys: None)
        patch.setattr("zimage_rt.batch.run.keep_latents", lambda store, keys: None)
        assert call_batch(capsys, bundle, rows, out).status == 0
    before = images_in(out)
    names = unfinished(out)
    assert len(names) == 6
    (out / "manifest.parquet").unlink()
    for name in names:
        (out / name).write_bytes((out / name).read_bytes()[:-9])
    for image in out.glob("*.png"):
        image.unlink()
    assert call_batch(capsys, bundle, rows, out).status == 0
    assert images_in(out) == before
    remove_records(FolderStore(out), [])
    assert spooled(FolderStore(out), "none") is None


def test_what_a_killed_writer_left_is_removed(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(1)), tmp_path / "out"
    (out / LATENTS).mkdir(parents=True)
    left = [out / ".row-0.png.0123abcd.part", out / LATENTS / f".{'0' * 32}.0123abcd.part", out / LATENTS / "0.npz"]
    mine = [out / ".mine.part", out / "mine.0123abcd.part"]
    for path in (*left, *mine):
        path.write_bytes(b"x")
    assert call_batch(capsys, bundle, rows, out).status == 0
    assert [path for path in left if path.exists()] == []
    assert [path for path in mine if not path.exists()] == []


def test_a_damaged_manifest_is_said(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(1)), tmp_path / "out"
    assert call_batch(capsys, bundle, rows, out).status == 0
    (out / "manifest.parquet").write_bytes(b"PAR1")
    assert_one_line_error(call_batch(capsys, bundle, rows, out), out / "manifest.parquet")


def test_a_group_decodes_when_its_time_is_up(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, ran: list[Program]
) -> None:
    monkeypatch.setattr(
        "zimage_rt.batch.run.ImageGenerator", functools.partial(generate.ImageGenerator, most_seconds=-1.0)
    )
    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(3)), tmp_path / "out"
    assert call_batch(capsys, bundle, rows, out).status == 0
    assert len(images_in(out)) == 3
    stages = [program for program in ran if program in (Program.DENOISER, Program.DECODER)]
    assert stages == [Program.DENOISER, Program.DENOISER, Program.DECODER] * 3, (
        "each row's steps and decoding by itself"
    )
    assert Counter(ran)[Program.TEXT_ENCODER] == 3


def test_two_batches_keep_out_of_each_others_way(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    from zimage_rt.batch.store import open_store

    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(1)), tmp_path / "out"
    store = open_store(str(out))
    assert isinstance(store, FolderStore)
    with store.alone():
        assert_one_line_error(call_batch(capsys, bundle, rows, out), out, "another batch")
    assert call_batch(capsys, bundle, rows, out).status == 0


def test_a_full_disk_ends_in_one_line_and_the_batch_goes_on_after(
    bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    rows, out, reference = write_rows(tmp_path / "rows.jsonl", rows_of(12)), tmp_path / "out", tmp_path / "reference"
    assert call_batch(capsys, bundle, rows, reference).status == 0
    out.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", out], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    try:
        outcome = call_batch(capsys, bundle, rows, out)
        assert outcome.status == 1
        assert_facts(outcome.err.strip(), "error:", "space")
        assert has_fact(outcome.err, out)
        assert not (out / "manifest.parquet").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", out], check=True)
        assert call_batch(capsys, bundle, rows, out).status == 0
        assert images_in(out) == images_in(reference)
        assert without_seconds(manifest_in(out)) == without_seconds(manifest_in(reference))
        shutil.rmtree(reference)
    finally:
        subprocess.run(["umount", out], check=True)


def test_a_file_that_may_not_be_so_large(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(2)), tmp_path / "out"
    words = ("batch", rows, "-m", bundle, "-o", out, "--executor", "cpu", "--quiet")
    outcome = finish(start("zimage-rt", *words, preexec_fn=limit))
    assert_one_line_error(outcome, "space")
    assert call_batch(capsys, bundle, rows, out).status == 0
    assert len(images_in(out)) == 2


def test_a_name_that_cannot_be_written(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    """A folder stands where a file should be, since the batch began: a record names the file."""
    rows, out = write_rows(tmp_path / "rows.jsonl", rows_of(3)), tmp_path / "out"
    assert call_batch(capsys, bundle, rows, out).status == 0
    before = images_in(out)
    (out / "row-1.png").unlink()
    (out / "row-1.png").mkdir()
    outcome = call_batch(capsys, bundle, rows, out)
    assert_one_line_error(outcome, out / "row-1.png")
    (out / "row-1.png").rmdir()
    assert call_batch(capsys, bundle, rows, out).status == 0
    assert images_in(out) == before


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_urls(bundle: Path, tmp_path: Path, capsys: Capture, scheme: str) -> None:
    import fsspec

    rows, reference = write_rows(tmp_path / "rows.jsonl", rows_of(3)), tmp_path / "reference"
    assert call_batch(capsys, bundle, rows, reference).status == 0
    url = f"{scheme}://{tmp_path / 'url'}"
    outcome = call_batch(capsys, bundle, rows, url)
    assert (outcome.status, outcome.err) == (0, "")
    assert sorted(outcome.lines) == [f"{url}/row-{n}.png" for n in range(3)]
    system = fsspec.filesystem(scheme)
    try:
        found = {name: system.cat_file(f"{tmp_path}/url/{name}") for name in images_in(reference)}
        assert found == images_in(reference)
        assert call_batch(capsys, bundle, rows, url).lines == []
        assert not [name for name in system.find(f"{tmp_path}/url") if ".part" in name or ".npz" in name]
        system.rm_file(f"{tmp_path}/url/row-1.png")
        assert call_batch(capsys, bundle, rows, url).lines == [f"{url}/row-1.png"]
    finally:
        system.rm(f"{tmp_path}/url", recursive=True)
