"""Keeping mapped weights from piling up in memory while a program runs through all of them once.

A mapped file's pages stay with the process until the kernel needs the memory. They are only cache, but they count as
the process's own wherever its memory is measured or limited. On Linux they can be released while the program runs: a
page that is needed again is read again.
"""

import contextlib
import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_SECONDS = 0.02
_MAPS = Path("/proc/self/maps")
_STATUS = Path("/proc/self/status")


@contextlib.contextmanager
def bounded_mappings(folder: Path, limit: int) -> Iterator[None]:
    """While the block runs, releases pages of files below `folder` whenever more than `limit` bytes are mapped in.

    What is mapped when the block begins must stay mapped, and unwritten, until it ends: load before, release after.
    Does nothing on other systems than Linux.
    """
    hand_back = _hand_back()
    if hand_back is None:
        yield
        return
    done = threading.Event()
    mappings = _mappings(folder)

    def watch() -> None:
        while not done.wait(_SECONDS):
            if _mapped_bytes() > limit:
                for address, length in mappings:
                    hand_back(address, length)

    watcher = threading.Thread(target=watch, name="residency", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _hand_back() -> Callable[[int, int], object] | None:
    """Takes the address and the length of a mapping whose pages this process no longer needs."""
    if sys.platform != "linux" or not _MAPS.exists():
        return None
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.restype = ctypes.c_int
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return lambda address, length: advise(address, length, mmap.MADV_DONTNEED)


def _mapped_bytes() -> int:
    """Pages of files that are in the process's memory, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) << 10
    return 0


def _mappings(folder: Path) -> list[tuple[int, int]]:
    """Address and length of each private mapping of a safetensors file below `folder`."""
    root = f"{folder.resolve()}/"
    found = []
    for line in _MAPS.read_text().splitlines():
        span, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith(root) and path[0].endswith(".safetensors") and "p" in permissions:
            start, _, stop = span.partition("-")
            found.append((int(start, 16), int(stop, 16) - int(start, 16)))
    return found
