"""One thread for each physical core that the process may use."""

import os
import sys
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


@pytest.fixture(autouse=True)
def _nobody_limits_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def four_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two threads each, all usable, and no quota; quotas are in `test_control_group`."""
    pairs = {number: f"{number % 4},{number % 4 + 4}" for number in range(8)}
    monkeypatch.setattr(threads, "_TOPOLOGY", machine(tmp_path / "cpu", pairs))
    monkeypatch.setattr(threads, "processor_quota", lambda: None)
    monkeypatch.setattr(threads, "_usable", lambda: set(range(8)))
    return tmp_path


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(("usable", "cores"), [(set(range(8)), 4), ({0, 4}, 1), ({0, 1}, 2), ({1, 5, 2}, 2), ({7}, 1)])
def test_two_threads_of_a_core_are_one(usable: set[int], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_usable", lambda: usable)
    assert thread_count() == cores


@pytest.mark.usefixtures("four_cores")
def test_a_kernel_without_a_topology_leaves_it_to_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path / "nothing")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 6)
    assert thread_count() == 6
    monkeypatch.setattr(threads, "_usable", lambda: {0, 1, 2})
    assert thread_count() == 3
    monkeypatch.setattr(threads, "_usable", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert thread_count() == 6


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_a_system_without_affinity_counts_its_cores(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(threads, "processor_quota", lambda: None)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 12 if logical else 6)
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


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(("value", "cores"), [("3", 3), ("1", 1), ("9", 4), ("0", 4), ("", 4), ("2,1", 4), ("-1", 4)])
def test_who_starts_the_process_may_limit_its_threads(value: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert thread_count() == cores
