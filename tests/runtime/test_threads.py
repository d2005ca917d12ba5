"""One thread for each physical core that the process may use."""

import os
from pathlib import Path

import pytest

from zimage_runtime.machine import cores as threads
from zimage_runtime.machine.cores import thread_count


def machine(root: Path, siblings: dict[int, str]) -> Path:
    for number, listed in siblings.items():
        folder = root / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{listed}\n")
    return root


@pytest.fixture
def four_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two threads each, all usable, and no quota."""
    pairs = {number: f"{number % 4},{number % 4 + 4}" for number in range(8)}
    monkeypatch.setattr(threads, "_TOPOLOGY", machine(tmp_path / "cpu", pairs))
    monkeypatch.setattr(threads, "_CONTROL_GROUP", tmp_path / "group")
    monkeypatch.setattr(threads, "_usable", lambda: set(range(8)))
    return tmp_path


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(("usable", "cores"), [(set(range(8)), 4), ({0, 4}, 1), ({0, 1}, 2), ({1, 5, 2}, 2), ({7}, 1)])
def test_two_threads_of_a_core_are_one(usable: set[int], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_usable", lambda: usable)
    assert thread_count() == cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "900000 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({}, 4),
    ],
)
def test_a_control_groups_quota_limits(four_cores: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (four_cores / "group" / name).parent.mkdir(parents=True, exist_ok=True)
        (four_cores / "group" / name).write_text(text)
    assert thread_count() == cores


@pytest.mark.usefixtures("four_cores")
def test_a_kernel_that_does_not_tell_leaves_it_to_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path / "nothing")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 6)
    assert thread_count() == 6
    monkeypatch.setattr(threads, "_usable", lambda: {0, 1, 2})
    assert thread_count() == 3
    monkeypatch.setattr(threads, "_usable", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert thread_count() == 6


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_this_machines_affinity_is_respected() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert thread_count() == 1
    finally:
        os.sched_setaffinity(0, before)
