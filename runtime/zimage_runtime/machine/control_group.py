"""The control groups that this process is in, from its own up to the root: each of them may limit it.

Systemd slices, Slurm jobs and containers nest groups, and the limit often stands on an outer one. Which groups these
are is in ``/proc/self/cgroup``; where they are mounted, and from which group on, is in ``/proc/self/mountinfo``.
Version 2 has one tree, version 1 a tree per controller, and a hybrid system has both.
Source: Linux kernel documentation, ``admin-guide/cgroup-v2`` and ``admin-guide/cgroup-v1``; ``cgroups(7)``.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROCESS = Path("/proc/self")
_CONVENTIONAL = Path("/sys/fs/cgroup")  # where the trees are, if the kernel does not list the mounts
_UNIFIED = ""  # the name of version 2's tree, which serves all controllers


@dataclass(frozen=True)
class MemoryLimit:
    """What one control group allows its processes together, in bytes."""

    limit: int
    left: int  # of the limit; file pages that the kernel can drop at once count as left


def memory_limits() -> tuple[MemoryLimit, ...]:
    """Memory limits of all groups from the innermost outwards; empty without limits, and on other systems."""
    found = [*map(_memory_v2, _groups(_UNIFIED)), *map(_memory_v1, _groups("memory"))]
    return tuple(limit for limit in found if limit is not None)


def processor_quota() -> float | None:
    """Processors' worth of time that the strictest group allows; None without a limit."""
    quotas = [*map(_quota_v2, _groups(_UNIFIED)), *map(_quota_v1, _groups("cpu"))]
    return min((quota for quota in quotas if quota is not None), default=None)


def _memory_v2(group: Path) -> MemoryLimit | None:
    # at memory.high the kernel slows the group down and reclaims pages, so it counts as a limit
    limits = [limit for name in ("memory.max", "memory.high") if (limit := _number(group / name)) is not None]
    used = _number(group / "memory.current")
    if not limits or used is None:
        return None
    return _limit(min(limits), used - _statistic(group, "inactive_file"))


def _memory_v1(group: Path) -> MemoryLimit | None:
    limit, used = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _NO_LIMIT_V1:
        return None
    return _limit(limit, used - _statistic(group, "total_inactive_file"))


_NO_LIMIT_V1 = 1 << 62  # version 1 writes "no limit" as the largest number of whole pages, near 2^63


def _limit(limit: int, used: int) -> MemoryLimit:
    return MemoryLimit(limit, max(limit - used, 0))


def _quota_v2(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def _quota_v1(group: Path) -> float | None:
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None  # -1 stands for no limit


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _statistic(group: Path, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _groups(controller: str) -> tuple[Path, ...]:
    """Folders of this process's groups in a controller's tree: its own first, the mounted root last.

    Where the path is of another namespace, its folders do not exist, and the mounted root is what is left to read.
    """
    mount = _mounts().get(controller)
    if mount is None:
        return ()
    inside = _inside(_own_path(controller), mount.root)
    own = mount.folder.joinpath(*inside)
    return (own, *list(own.parents)[: len(inside)])


def _inside(path: str, root: str) -> tuple[str, ...]:
    """The parts of a group's path below the group that is mounted; empty where it is not below it."""
    try:
        parts = PurePosixPath(path).relative_to(root).parts
    except ValueError:
        return ()
    return () if ".." in parts else parts  # ".." leads out of the namespace, to groups that cannot be seen


def _own_path(controller: str) -> str:
    """The group of this process in a controller's tree, "/" where the kernel does not list it."""
    for line in _lines(_PROCESS / "cgroup"):  # 4:memory:/user.slice, or 0::/user.slice in version 2
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(","):
            return path or "/"
    return "/"


@dataclass(frozen=True)
class _Mount:
    folder: Path
    root: str  # the group that is found at the folder


def _mounts() -> dict[str, _Mount]:
    """Where each controller's tree is mounted."""
    found: dict[str, _Mount] = {}
    for line in _lines(_PROCESS / "mountinfo"):
        # 35 24 0:30 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
        fields, _, kind = line.partition(" - ")
        words, options = fields.split(), kind.split()
        if len(words) < 5 or len(options) < 3:
            continue
        mount = _Mount(Path(_unescaped(words[4])), _unescaped(words[3]))
        if options[0] == "cgroup2":
            found.setdefault(_UNIFIED, mount)
        elif options[0] == "cgroup":
            for controller in options[2].split(","):
                found.setdefault(controller, mount)
    return found or {
        _UNIFIED: _Mount(_CONVENTIONAL, "/"),
        "memory": _Mount(_CONVENTIONAL / "memory", "/"),
        "cpu": _Mount(_CONVENTIONAL / "cpu", "/"),
    }


def _unescaped(text: str) -> str:
    """A path of mountinfo, which writes a space as \\040."""
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def _lines(path: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from path.read_text(errors="replace").splitlines()
