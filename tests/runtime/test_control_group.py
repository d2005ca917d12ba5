"""Limits of nested control groups, in both versions: memory that is left, and processor time."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from zimage_runtime.machine import control_group, cores
from zimage_runtime.machine.control_group import MemoryLimit, memory_limits, processor_quota
from zimage_runtime.machine.host_memory import available_memory, control_group_limit

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712


class Machine:
    """A tree of control groups in a folder, and what /proc/self says of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.mounts, self.groups = root, list[str](), list[str]()
        (root / "proc").mkdir()

    def mount(self, folder: str, kind: str, options: str, root: str = "/") -> None:
        at = str(self.root / folder).replace(" ", "\\040")
        self.mounts.append(f"35 24 0:30 {root} {at} rw,nosuid shared:9 - {kind} {kind} {options}")
        self._write("proc/mountinfo", "\n".join(self.mounts))

    def enter(self, line: str) -> None:
        self.groups.append(line)
        self._write("proc/cgroup", "\n".join(self.groups))

    def v2(self, path: str, *, root: str = "/") -> None:
        """This process in a group of version 2, on a machine with nothing else."""
        self.mount("cgroup", "cgroup2", "rw,nsdelegate", root)
        self.enter(f"0::{path}")

    def v1(self, path: str, *, root: str = "/") -> None:
        """This process in the same group of version 1's trees for memory and processor time."""
        self.mount("cgroup/memory", "cgroup", "rw,memory", root)
        self.mount("cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct", root)
        self.enter(f"9:memory:{path}")
        self.enter(f"4:cpu,cpuacct:{path}")
        self.enter("1:name=systemd:/elsewhere")

    def group(self, path: str, **files: object) -> None:
        for name, value in files.items():
            self._write(f"cgroup/{path}/{name.replace('__', '.')}", f"{value}\n")

    def memory_v2(self, path: str, limit: object, used: int, cached: int = 0) -> None:
        stat = f"anon 7\nfile 9\ninactive_file {cached}\nactive_file 5"
        self.group(path, memory__max=limit, memory__current=used, memory__stat=stat)

    def memory_v1(self, path: str, limit: int, used: int, cached: int = 0) -> None:
        stat = f"cache 3\ninactive_file 1\ntotal_inactive_file {cached}"
        files = {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": used, "memory__stat": stat}
        self.group(f"memory/{path}", **files)

    def _write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(control_group, "_PROCESS", tmp_path / "proc")
    monkeypatch.setattr(control_group, "_CONVENTIONAL", tmp_path / "cgroup")
    return Machine(tmp_path)


def lefts() -> list[int]:
    return [limit.left for limit in memory_limits()]


def test_the_least_of_nested_groups_of_version_2_counts(machine: Machine) -> None:
    """A systemd service: the limit stands on its slice, and its neighbours use some of it."""
    machine.v2("/user.slice/user-1000.slice/run.scope")
    machine.memory_v2("user.slice/user-1000.slice/run.scope", "max", 1000)
    machine.memory_v2("user.slice/user-1000.slice", 4000, 3000, cached=500)
    machine.memory_v2("user.slice", 9000, 3100)
    assert lefts() == [1500, 5900]
    assert available_memory() == 1500
    assert control_group_limit() == 4000


def test_the_least_of_nested_groups_of_version_1_counts(machine: Machine) -> None:
    """A Slurm job: the limit stands on the job, two levels above the task."""
    machine.v1("/slurm/uid_1/job_2/step_0")
    machine.memory_v1("slurm/uid_1/job_2/step_0", NO_LIMIT_V1, 900)
    machine.memory_v1("slurm/uid_1/job_2", 5000, 2000, cached=250)
    machine.memory_v1("", NO_LIMIT_V1, 100_000)
    assert memory_limits() == (MemoryLimit(5000, 3250),)
    assert control_group_limit() == 5000


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_container_sees_its_own_group_as_the_root(machine: Machine, version: str) -> None:
    """Docker with a namespace of its own: the path is "/", and the files of the root are the container's."""
    if version == "v2":
        machine.v2("/")
        machine.memory_v2("", 3000, 1000)
    else:
        machine.v1("/")
        machine.memory_v1("", 3000, 1000)
    assert lefts() == [2000]


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/docker/abc", "/docker/abc"),  # without a namespace, only the container's group is mounted
        ("/docker/abc/sub", "/docker/abc"),
        ("/../..", "/../.."),
        ("/../../other", "/"),  # a group outside of what is mounted
        ("/docker/abc", "/"),  # the path of the host, the tree of the container
    ],
)
def test_a_path_that_is_not_mounted_leaves_the_mounted_root(machine: Machine, path: str, root: str) -> None:
    machine.v2(path, root=root)
    machine.memory_v2("", 3000, 1000)
    machine.memory_v2("sub", 2500, 100)
    inner = [2400] if path.endswith("/sub") else []
    assert lefts() == [*inner, 2000]


def test_nothing_outside_of_the_mount_is_read(machine: Machine) -> None:
    machine.mount("cgroup/here", "cgroup2", "rw")
    machine.enter("0::/../there")
    machine.memory_v2("here", 3000, 1000)
    machine.memory_v2("there", 1500, 1000)
    assert lefts() == [2000]


def test_a_hybrid_machine_has_both_trees(machine: Machine) -> None:
    machine.mount("cgroup/unified", "cgroup2", "rw")
    machine.enter("0::/a")
    machine.v1("/b")
    machine.memory_v1("b", 5000, 1000)
    machine.memory_v2("unified/a", 3500, 1000)
    assert sorted(lefts()) == [2500, 4000]


def test_a_group_over_its_limit_has_nothing_left(machine: Machine) -> None:
    machine.v2("/a")
    machine.memory_v2("a", 1000, 1500, cached=100)
    assert lefts() == [0]


def test_memory_that_is_throttled_is_not_counted_on(machine: Machine) -> None:
    """systemd's MemoryHigh: processes above it are slowed down until they give pages back."""
    machine.v2("/a")
    machine.memory_v2("a", "max", 1000)
    machine.group("a", memory__high=1800)
    assert lefts() == [800]


def test_without_mounts_in_proc_the_usual_folder_is_read(machine: Machine) -> None:
    machine.memory_v2("", 3000, 1000)
    assert lefts() == [2000]


def test_a_mount_point_may_contain_a_space(machine: Machine) -> None:
    machine.mount("cgroup/with space", "cgroup2", "rw")
    machine.enter("0::/a")
    machine.memory_v2("with space/a", 3000, 1000)
    assert lefts() == [2000]


def test_without_control_groups_the_machine_is_the_limit(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_limits() == ()
    assert processor_quota() is None
    assert control_group_limit() is None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5 * GIB, "total": 8 * GIB}))
    assert available_memory() == 5 * GIB
    machine.v2("/a")
    machine.memory_v2("a", 9 * GIB, GIB)
    assert available_memory() == 5 * GIB
    assert control_group_limit() is None, "a limit above the machine's memory is none"


def test_files_that_say_nonsense_are_no_limit(machine: Machine) -> None:
    machine.v2("/a")
    machine.memory_v2("a", "soon", 1)
    machine.group("a", cpu__max="10 0")
    machine.mounts.append("nonsense")
    machine.mount("cgroup/more", "cgroup2", "rw")
    assert memory_limits() == ()
    assert processor_quota() is None


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_usable", lambda: set(range(8)))
    monkeypatch.setattr(cores, "_cores", lambda usable, topology: len(usable))


def quota_v2(machine: Machine, path: str, quota: str) -> None:
    machine.group(path, cpu__max=f"{quota} 100000")


def quota_v1(machine: Machine, path: str, quota: str) -> None:
    us = "-1" if quota == "max" else quota
    machine.group(f"cpu,cpuacct/{path}", cpu__cfs_quota_us=us, cpu__cfs_period_us=100_000)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(("enter", "limit"), [(Machine.v2, quota_v2), (Machine.v1, quota_v1)])
@pytest.mark.parametrize(
    ("quotas", "threads"),
    [
        ({"a/b": "max", "a": "200000"}, 2),
        ({"a/b": "300000", "a": "500000"}, 3),
        ({"a/b": "700000", "a": "150000"}, 2),
        ({"a/b": "10000", "a": "max"}, 1),
        ({"a/b": "max", "a": "max"}, 8),
        ({"a/b": "max", "a": "900000"}, 8),
        ({"a/b": "max", "": "400000"}, 4),
    ],
)
def test_the_least_quota_of_nested_groups_limits_the_threads(
    machine: Machine,
    enter: Callable[[Machine, str], None],
    limit: Callable[[Machine, str, str], None],
    quotas: dict[str, str],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    enter(machine, "/a/b")
    for path, quota in quotas.items():
        limit(machine, path, quota)
    assert cores.thread_count() == threads
