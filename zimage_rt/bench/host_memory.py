"""What a process holds of the machine's memory, read from outside."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HostMemory:
    """Bytes in memory now. What a system does not tell is None."""

    resident: int
    anonymous: int | None  # heap, arenas, packed weights, shared memory: what does not yield
    mapped: int | None  # pages of files, which do


_HAS_PROC = Path("/proc/self/status").exists()

UNTOLD = "this system does not tell a process's own memory from mapped files"


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


def forget_cached(paths: list[Path]) -> bool:
    """Asks the system to drop files from its page cache; whether all of them were dropped as far as it tells."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # pages not yet on the disk would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
    return True


def read_through(paths: list[Path], room: int) -> bool:
    """Reads files so that they are in the page cache, unless they take more than `room` bytes."""
    if sum(path.stat().st_size for path in paths) > room:
        return False
    piece = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            _drain(file, piece)
    return True


def _drain(file: Any, piece: bytearray) -> None:
    while file.readinto(piece):
        pass
