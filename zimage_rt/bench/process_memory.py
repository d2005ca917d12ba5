"""How much of the machine's memory a process uses, read from outside."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a process in memory now; None for what the system does not report."""

    resident: int
    anonymous: int | None  # heap, arenas, packed weights, shared memory: what does not yield
    mapped: int | None  # pages of files, which do


_HAS_PROC = Path("/proc/self/status").exists()

NOT_SPLIT = "this system does not report a process's own memory apart from mapped files"


def read_host_memory(pid: int) -> HostMemory | None:
    """A process's memory; None when it is gone. On Linux from /proc, elsewhere the total alone."""
    if _HAS_PROC:
        return _from_status(Path(f"/proc/{pid}/status"))
    import psutil

    try:
        return HostMemory(int(psutil.Process(pid).memory_info().rss), None, None)
    except psutil.Error:
        return None


def read_own_memory() -> HostMemory | None:
    """This process's memory."""
    return read_host_memory(os.getpid())


def _from_status(status: Path) -> HostMemory | None:
    found: dict[str, int] = {}
    try:
        with status.open(encoding="ascii", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in ("RssAnon", "RssFile", "RssShmem"):
                    found[name] = int(value.split()[0]) << 10
    except OSError:
        return None
    if "RssAnon" not in found:  # a process that has ended, and waits for its parent to notice
        return None
    anonymous, mapped = found["RssAnon"] + found.get("RssShmem", 0), found.get("RssFile", 0)
    return HostMemory(anonymous + mapped, anonymous, mapped)
