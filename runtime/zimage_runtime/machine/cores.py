"""How many threads compute: one for each physical core that this process may use."""

import contextlib
import math
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container sees its own group here


def thread_count() -> int:
    """Physical cores that this process may use: a second thread on a core slows matrix products down.

    What it may use is what its affinity and its control group's quota of processor time leave.
    """
    usable = _usable()
    cores = _cores(usable, _TOPOLOGY) if usable is not None else None
    if cores is None:
        import psutil

        logical = len(usable) if usable is not None else os.cpu_count() or 1
        cores = min(psutil.cpu_count(logical=False) or logical, logical)
    quota = _quota(_CONTROL_GROUP)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _usable() -> set[int] | None:
    """The logical processors that this process may run on; None where the system does not say."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on Windows or macOS
        return None


def _cores(usable: set[int], topology: Path) -> int | None:
    """Physical cores of which at least one thread is usable; None where the kernel does not tell."""
    siblings = set()
    for number in usable:
        try:
            siblings.add((topology / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            return None
    return len(siblings) or None


def _quota(root: Path) -> float | None:
    """Processors' worth of time that the control group allows; None without a limit."""
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = (root / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            return quota_us / int((root / "cpu" / "cpu.cfs_period_us").read_text())
    return None
