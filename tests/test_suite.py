"""The suite's own tools: what a test may not leave is noticed, and what all share is made once."""

import os
import subprocess
import sys
from pathlib import Path

import leftovers
import pytest
from leftovers import assert_nothing_left, children, names_in
from sharing import made_once, one_core_per_worker


def test_a_process_that_is_left_is_named() -> None:
    before = children(), names_in(leftovers.REPOSITORY)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        if not children():
            pytest.skip("the kernel does not list a process's children")
        with pytest.raises(AssertionError, match=r"input\(\)"):
            assert_nothing_left(*before)
    finally:
        process.communicate()
    assert_nothing_left(*before)


def test_a_file_that_is_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "REPOSITORY", tmp_path)
    before = children(), names_in(tmp_path)
    (tmp_path / ".cache").mkdir()
    assert_nothing_left(*before)
    (tmp_path / "zimage-1.png").touch()
    with pytest.raises(AssertionError, match=r"zimage-1\.png"):
        assert_nothing_left(*before)


def test_what_is_shared_is_made_once_and_whole(tmp_path_factory: pytest.TempPathFactory) -> None:
    name = f"made-by-{os.getpid()}"
    calls: list[Path] = []

    def fail_half_way(out: Path) -> None:
        out.mkdir()
        (out / "half").touch()
        raise OSError("no space left")

    def make(out: Path) -> None:
        calls.append(out)
        out.mkdir()
        (out / "whole").touch()

    with pytest.raises(OSError, match="no space left"):
        made_once(tmp_path_factory, name, fail_half_way)
    made = [made_once(tmp_path_factory, name, make) for _ in range(2)]
    assert made[0] == made[1]
    assert len(calls) == 1
    assert [path.name for path in made[0].iterdir()] == ["whole"]


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no affinity")
def test_a_worker_has_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        one_core_per_worker()
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    one_core_per_worker()
    assert bound == [{2}, {5}, {2}]
