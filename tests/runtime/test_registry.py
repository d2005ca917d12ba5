"""An executor is one file and a line in the registry; `auto` tries them in that order, for each request."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_executor
from facts import assert_facts, raises_with

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import MemoryLimitError, RequestError
from zimage_runtime.executors import registry
from zimage_runtime.executors.choose import ExecutorChoice
from zimage_runtime.executors.protocol import Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.pipeline import NoticeEvent, Pipeline, Request

SMALL, LARGE = (64, 64), (96, 64)


@pytest.fixture(autouse=True)
def _toy_first() -> Iterator[None]:
    """The toy's line in the registry, before the CPU's."""
    before = dict(registry._MODULES)
    registry._MODULES.clear()
    registry._MODULES.update({"toy": "toy_executor", "cpu": before["cpu"]})
    toy_executor.LOG.clear()
    toy_executor.BROKEN.clear()
    yield
    registry._MODULES.clear()
    registry._MODULES.update(before)


def test_an_executor_of_one_file_generates(bundle: Path) -> None:
    with Pipeline.from_bundle(bundle, "toy") as toy, Pipeline.from_bundle(bundle, "cpu") as cpu:
        found, expected = (p.generate("a fox", size=SMALL, steps=2, seed=1, count=3) for p in (toy, cpu))
    assert [info.executor for info in found.infos] == ["toy"] * 3
    for one, other in zip(found.images, expected.images, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert toy_executor.LOG == ["open", "close"]


def test_auto_goes_to_the_next_for_a_request_that_the_best_cannot_hold(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zimage_runtime.executors.ort import cpu

    opened = cpu._open
    log = toy_executor.LOG

    def noted(*arguments: object) -> object:
        log.append("open cpu")
        return opened(*arguments)  # type: ignore[arg-type]

    object.__setattr__(cpu.KIND, "open", noted)
    try:
        with Pipeline.from_bundle(bundle) as pipeline:
            assert pipeline.executor.name == "toy"
            small = pipeline.prepare(Request("a fox", size=SMALL, steps=1, seed=1))
            assert small.executor.name == "toy"
            assert small.choice is not None
            assert_facts(small.choice, "toy", "Toy 3000")
            assert small.notices == ()
            large = pipeline.prepare(Request("a fox", size=LARGE, steps=1, seed=1))
            assert large.executor.name == "cpu"
            (notice,) = [event for event in pipeline.run(large) if isinstance(event, NoticeEvent)]
            assert notice.warning
            assert_facts(notice.text, "CPU", "toy", "96x64")
            assert log == ["open", "close", "open cpu"], "the one that is left is closed first"
            assert pipeline.prepare(Request("a fox", size=SMALL, steps=1, seed=1)).executor.name == "toy"
            with raises_with(RequestError, "prepare"):
                pipeline.run(large)
            assert log == ["open", "close", "open cpu", "open"]
        assert log[-1] == "close"
    finally:
        object.__setattr__(cpu.KIND, "open", opened)


def test_a_named_executor_never_falls_back(bundle: Path) -> None:
    with Pipeline.from_bundle(bundle, "toy") as pipeline, raises_with(MemoryLimitError, "96x64", "toy"):
        pipeline.prepare(Request("a fox", size=LARGE))


@pytest.mark.parametrize("kind", ["unavailable", "open"])
def test_what_cannot_open_is_left_out_with_its_reason(bundle: Path, kind: str) -> None:
    toy_executor.BROKEN[kind] = "its battery is empty"
    with Pipeline.from_bundle(bundle) as pipeline:
        job = pipeline.prepare(Request("a fox", size=SMALL, steps=1))
    assert job.executor.name == "cpu"
    assert job.choice is not None
    assert_facts(job.choice, "CPU", "its battery is empty")
    # a missing GPU is what one expects of a machine without one; a GPU that does not open is worth a warning
    assert bool(job.notices) == (kind == "open")


def test_what_no_executor_can_hold_is_refused_with_the_last_ones_reason(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zimage_runtime.executors.ort import cpu_plan

    monkeypatch.setattr(cpu_plan, "available_memory", lambda: 1 << 20)
    with Pipeline.from_bundle(bundle) as pipeline, raises_with(MemoryLimitError, "96x64", "GiB"):
        pipeline.prepare(Request("a fox", size=LARGE))


def test_an_unknown_executor_names_those_that_exist(bundle: Path) -> None:
    with raises_with(RequestError, "'abacus'", "auto", "toy", "cpu"):
        Pipeline.from_bundle(bundle, "abacus")


def test_a_choice_that_is_closed_opens_again(bundle: Path) -> None:
    choice = ExecutorChoice(Bundle.open(bundle))
    config = choice.bundle.manifest.config
    for _ in range(2):
        assert choice.plan(Work(geometry=image_geometry(*SMALL, config), tokens=8)).executor.name == "toy"
        choice.close()
    assert toy_executor.LOG == ["open", "close"] * 2


COMMAND = """
import sys
from zimage_runtime.executors import registry
registry._MODULES["toy"] = "toy_executor"
from zimage_rt.cli import main
main()
"""


def test_the_commands_know_it_from_its_line_alone(bundle: Path, tmp_path: Path) -> None:
    """`run`, `plan` and `doctor`, in a process whose registry has one more line."""

    def command(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *map(str, words)],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return done.stdout

    words = ("run", "a fox", "-m", bundle, "--executor", "toy", "--size", "32x32", "--steps", 1, "-o", "fox.png")
    assert command(*words).split() == ["fox.png"]
    planned = json.loads(command("plan", bundle, "--executor", "toy", "--size", "32x32", "--json"))
    assert (planned["executor"], planned["peak"]) == ("toy", 32 * 32)
    checks = {check["name"]: check for check in json.loads(command("doctor", "--json"))["checks"]}
    assert checks["toy"]["values"] == {"toy": True}
