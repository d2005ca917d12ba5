"""The system's page cache, emptied or filled before a measurement: loading then starts from a known state."""

import os
import sys
from pathlib import Path
from typing import Any


def forget_cached(paths: list[Path]) -> bool:
    """Asks the system to drop files from its page cache. False where it cannot be asked, or refuses."""
    if sys.platform == "win32" or sys.platform == "darwin":  # no posix_fadvise
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
