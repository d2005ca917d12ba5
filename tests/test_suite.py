"""The suite's own tools: facts in errors, what a test may not leave, and what all tests share."""

import os
import subprocess
import sys
from pathlib import Path

import leftovers
import pytest
from facts import has_fact, raises_with
from leftovers import assert_nothing_left, children, names_in
from sharing import made_once, one_core_per_worker


def test_a_process_that_is_left_is_named() -> None:
    before = children(), names_in(leftovers.REPOSITORY)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], **pipes)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # a process that only begins has no command line yet
        if not children():
            pytest.skip("the kernel does not list a process's children")
        with raises_with(AssertionError, "input()"):
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
    with raises_with(AssertionError, "zimage-1.png"):
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

    with raises_with(OSError, "no space left"):
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


def test_facts_are_words_of_their_own() -> None:
    line = "cat.png: needs 2.5 GiB at 128x64, and 8 is available; use --low-memory (`zimage-rt doctor`)"
    for fact in ("cat.png", "2.5 GiB", "128x64", 8, "--low-memory", "`zimage-rt doctor`"):
        assert has_fact(line, fact), fact
    for other in ("at.png", "cat.pn", 2, 5, "28x64", "128x6", 6, "--low"):
        assert not has_fact(line, other), other


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (UnicodeError("7 is unknown"), (7,)),  # of a subclass
        (ValueError("17 is unknown"), (7,)),
        (ValueError("7 is\nunknown"), (7,)),
        (ValueError("7 is unknown"), ()),
        (ValueError("7 is unknown"), ("",)),
    ],
    ids=repr,
)
def test_an_error_without_its_facts_fails(error: Exception, facts: tuple[object, ...]) -> None:
    with pytest.raises(AssertionError), raises_with(ValueError, *facts):
        raise error


def test_an_error_with_its_facts_passes() -> None:
    with raises_with(ValueError, 7, "unknown") as caught:
        raise ValueError("7 is unknown")
    assert caught.type is ValueError
