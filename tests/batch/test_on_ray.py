"""`zimage-rt batch --ray`: the images of one machine, and nothing lost or done twice when a process dies."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
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
from facts import raises_with
from PIL import Image

from zimage_rt import demo_bundle
from zimage_rt.batch import on_ray
from zimage_rt.batch.generate import Failure
from zimage_rt.batch.items import Item, check_rows
from zimage_rt.batch.on_ray import Cluster, Pool, Worker, WorkerOptions
from zimage_rt.batch.records import Record, recorded_keys
from zimage_rt.batch.rows import Row
from zimage_rt.batch.store import ATTEMPTS, FolderStore
from zimage_runtime.errors import RequestError
from zimage_runtime.pipeline import Pipeline
from zimage_runtime.stages import Stages

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

TWO_WORKERS = ("--executor", "cpu", "--quiet", "--workers", 2, "--cpus-per-worker", 1, "--ray", "local")


def words(rows: Path, out: Path | str, *options: object) -> tuple[object, ...]:
    return ("batch", rows, "-m", demo_bundle(), "-o", out, *options)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    rows = [Row(number, values) for number, values in enumerate(rows_of(4), 1)]
    with Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        found, bad = check_rows(rows, tmp_path, pipeline.check, metadata=True, advance=lambda amount: None)
    assert bad == []
    return found


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = Worker(WorkerOptions(bundle=None, executor="cpu", output=str(tmp_path / "out")), 1)
    yield made
    made._generator.pipeline.close()


# A worker, without Ray


def test_a_group_crosses_processes(items: list[Item]) -> None:
    assert on_ray.group_items(on_ray.group_text(items)) == items


def test_a_worker_makes_what_is_not_there_yet(items: list[Item], worker: Worker, tmp_path: Path) -> None:
    first = [on_ray.outcome_of(text) for text in worker({"group": [on_ray.group_text(items[:2])]})["outcome"]]
    again = [on_ray.outcome_of(text) for text in worker({"group": [on_ray.group_text(items[:3])]})["outcome"]]
    assert again[:2] == first
    assert [one.key for one in again] == [item.key for item in items[:3]]
    assert all(isinstance(one, Record) for one in again)
    assert recorded_keys(FolderStore(tmp_path / "out")) == {item.key for item in items[:3]}
    assert list((tmp_path / "out" / ATTEMPTS).iterdir()) == []


def test_where_a_worker_cannot_write_the_batch_ends(items: list[Item], worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "out" / items[0].file).mkdir()
    (text,) = worker({"group": [on_ray.group_text(items[:1])]})["outcome"]
    with raises_with(IsADirectoryError, tmp_path / "out" / items[0].file):
        on_ray.outcome_of(text)


class Died(BaseException):
    """The worker's process is gone."""


def test_a_row_that_workers_die_of_fails_and_the_others_do_not(
    items: list[Item], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives a dead worker's group to another one, again and again."""
    states, poison = Stages.hidden_states, tuple(worker._generator.pipeline.token_ids(items[1].prompts[0]))

    def deadly(stages: Stages, session: Any, ids: tuple[int, ...]) -> Any:
        if ids == poison:
            raise Died
        return states(stages, session, ids)

    monkeypatch.setattr(Stages, "hidden_states", deadly)
    assert len({item.prompts for item in items[:3]}) == 3
    for _ in range(3):
        with pytest.raises(Died):
            worker({"group": [on_ray.group_text(items[:3])]})
    outcomes = [on_ray.outcome_of(text) for text in worker({"group": [on_ray.group_text(items[:3])]})["outcome"]]
    assert {one.key for one in outcomes if isinstance(one, Record)} == {items[0].key, items[2].key}
    assert [one.key for one in outcomes if isinstance(one, Failure)] == [items[1].key]
    monkeypatch.undo()
    (outcome,) = worker({"group": [on_ray.group_text(items[1:2])]})["outcome"]
    assert isinstance(on_ray.outcome_of(outcome), Record)


@needs_ray
@pytest.mark.deep  # imports Ray, which takes seconds
@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}], (None, None), Pool(3, 1, 1)),
        ([{"CPU": 8.0, "GPU": 2.0}], (1, None), Pool(1, 1, 1)),
        ([{"CPU": 8.0, "GPU": 2.0}], (None, 4), Pool(2, 4, 0)),
        ([{"CPU": 8.0}, {"CPU": 4.0}, {}], (None, None), Pool(3, 4, 0)),
        ([{"CPU": 8.0}, {"CPU": 3.0}], (None, 2), Pool(5, 2, 0)),
        ([{"CPU": 8.0}], (9, 4), Pool(2, 4, 0)),
    ],
)
def test_how_many_workers(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    asked: tuple[int | None, int | None],
    expected: Pool,
) -> None:
    import ray

    dead = {"Alive": False, "Resources": {"CPU": 99.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": node} for node in nodes)])
    assert Cluster("local").pool(*asked) == expected
    with raises_with(RequestError, 64, "--cpus-per-worker"):
        Cluster("local").pool(None, 64)


# On Ray


@pytest.mark.slow
@needs_ray
def test_two_workers_make_the_images_of_one_machine(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*rows_of(5), {**rows_of(1)[0], "id": "wide", "size": "48x32"}])
    out, reference = tmp_path / "out", tmp_path / "reference"
    assert finished(start("zimage-rt", *words(rows, reference, "--executor", "cpu", "--quiet"))).status == 0
    outcome = finished(start("zimage-rt", *words(rows, out, *TWO_WORKERS)))
    assert (outcome.status, outcome.err) == (0, "")
    assert sorted(outcome.lines) == sorted(str(out / name) for name in images_in(reference))
    assert images_in(out) == images_in(reference)
    assert without_seconds(manifest_in(out)) == without_seconds(manifest_in(reference))
    assert unfinished(out) == []


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [one for one in process.children(recursive=True) if "MapWorker" in title_of(one)]


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def prepared(tmp_path: Path, number: int) -> tuple[Path, Path, Path]:
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(number, size="96x96", steps=8))
    reference = tmp_path / "reference"
    assert finished(start("zimage-rt", *words(rows, reference, "--executor", "cpu", "--quiet"))).status == 0
    return rows, tmp_path / "out", reference


@pytest.mark.slow
@needs_ray
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    rows, out, reference = prepared(tmp_path, 24)
    process = start("zimage-rt", *words(rows, out, *TWO_WORKERS))
    wait_for(lambda: len(list(out.glob("*.png"))) >= 6, "images")
    workers = workers_of(psutil.Process(process.pid))
    assert len(workers) == 2
    workers[0].kill()
    outcome = finished(process)
    assert outcome.status == 0, outcome.err
    assert "Traceback" not in outcome.err  # Ray says that the worker died
    assert sorted(outcome.lines) == sorted(str(out / name) for name in images_in(reference))
    assert images_in(out) == images_in(reference)
    assert without_seconds(manifest_in(out)) == without_seconds(manifest_in(reference))
    assert unfinished(out) == []


@pytest.mark.slow
@needs_ray
def test_a_driver_that_is_killed(tmp_path: Path) -> None:
    rows, out, reference = prepared(tmp_path, 24)
    process = start("zimage-rt", *words(rows, out, *TWO_WORKERS))
    wait_for(lambda: len(list(out.glob("*.png"))) >= 10, "images")
    workers = workers_of(psutil.Process(process.pid))
    process.kill()
    finished(process)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert (len(workers), alive) == (2, [])
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 10 <= len(before) < 24
    outcome = finished(start("zimage-rt", *words(rows, out, *TWO_WORKERS)))
    assert (outcome.status, outcome.err) == (0, "")
    assert sorted(outcome.lines) == sorted(str(out / name) for name in images_in(reference) if name not in before)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert images_in(out) == images_in(reference)
    assert without_seconds(manifest_in(out)) == without_seconds(manifest_in(reference))


@pytest.mark.slow
@needs_ray
def test_a_url_and_a_row_that_fails(tmp_path: Path) -> None:
    good = rows_of(3)
    rows = write_rows(tmp_path / "rows.jsonl", [*good, {**good[0], "id": "bad", "image": "in.png"}])
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    url = f"file://{tmp_path / 'out'}"
    process = start("zimage-rt", *words(rows, url, *TWO_WORKERS), "--json")
    wait_for(lambda: bool(workers_of(psutil.Process(process.pid))), "workers")
    (tmp_path / "in.png").unlink()  # after it was checked
    outcome = finished(process)
    document = json.loads(outcome.out)
    assert (document["generated"], [one["id"] for one in document["failed"]]) == (3, ["bad"])
    assert "in.png" in document["failed"][0]["error"]
    assert outcome.status == 1
    assert set(images_in(tmp_path / "out")) == {f"{row['id']}.png" for row in good}


PRIVATE = """
import json, os, sys
from zimage_rt.batch.on_ray import Cluster
with Cluster("local"):
    import ray
    from ray._common.usage.usage_lib import usage_stats_enabled

    @ray.remote
    def enabled():
        from ray._common.usage.usage_lib import usage_stats_enabled
        return usage_stats_enabled(), os.environ["RAY_USAGE_STATS_ENABLED"]

    found = [usage_stats_enabled(), *ray.get(enabled.remote()), ray._private.worker.get_dashboard_url()]
    print(json.dumps(found), file=sys.__stdout__)
"""


@pytest.mark.slow
@needs_ray
def test_nothing_is_reported_and_nothing_appears_in_the_home_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PRIVATE], env={**os.environ, "HOME": str(home)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) in ([False, False, "0", None], [False, False, "0", ""])
    assert list(home.rglob("*")) == []


@pytest.mark.deep
@needs_ray
def test_an_address_where_nothing_is(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(1))
    outcome = finished(start("zimage-rt", *words(rows, tmp_path / "out", *TWO_WORKERS[:-1], "127.0.0.1:1")))
    assert outcome.status == 1
    assert outcome.err.startswith("error: ")
    assert "127.0.0.1:1" in outcome.err
    assert len(outcome.err.splitlines()) == 1
