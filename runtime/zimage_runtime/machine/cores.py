"""How many threads compute: one per physical core that this process may use."""

import math
import os
import sys
from pathlib import Path

from .control_group import processor_quota

_TOPOLOGY = Path("/sys/devices/system/cpu")


def thread_count() -> int:
    """Physical cores that this process may use: a second thread on a core slows matrix products down.

    The process's affinity and the quota of processor time of its control groups limit which and how many, and so does
    OMP_NUM_THREADS, which schedulers of jobs set where several processes share a machine.
    """
    usable = _usable()
    cores = _cores(usable, _TOPOLOGY) if usable is not None else None
    if cores is None:
        import psutil

        logical = len(usable) if usable is not None else os.cpu_count() or 1
        cores = min(psutil.cpu_count(logical=False) or logical, logical)
    quota, threads = processor_quota(), os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads):
        cores = min(cores, int(threads))
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _usable() -> set[int] | None:
    """Logical processors that this process may run on; None where the system has no affinity (macOS, Windows)."""
    if sys.platform == "darwin" or sys.platform == "win32":
        return None
    return os.sched_getaffinity(0)


def _cores(usable: set[int], topology: Path) -> int | None:
    """Physical cores of which at least one thread is usable; None where the kernel does not list them."""
    siblings = set()
    for number in usable:
        try:
            siblings.add((topology / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            return None
    return len(siblings) or None
