"""What a test may not leave: processes that it started, and files in the repository."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_TASKS = Path("/proc/self/task")
_LONG_LIVED = (
    "multiprocessing.resource_tracker",  # Python's own, one for all tests
    "multiprocessing.forkserver",
    "shared test server",  # of all tests of a module, which stops it
)


def children() -> set[int]:
    """Processes that this one has started and not yet waited for; none where the kernel does not list them."""
    found: set[int] = set()
    for thread in os.listdir(_TASKS) if _TASKS.exists() else ():
        try:
            found.update(map(int, (_TASKS / thread / "children").read_text().split()))
        except OSError:  # the thread has ended, or the kernel is built without these lists
            continue
    return found


def names_in(folder: Path) -> set[str]:
    """What lies directly in a folder, but for the hidden folders of caches."""
    return {name for name in os.listdir(folder) if not name.startswith(".")}


def assert_nothing_left(processes: set[int], names: set[str]) -> None:
    """Compares with what `children` and `names_in` gave before the test."""
    left = [command for pid in children() - processes if not _is_long_lived(command := _command(pid))]
    assert not left, f"processes that the test started still run, or were not waited for: {left}"
    written = sorted(names_in(REPOSITORY) - names)
    assert not written, f"written to the repository: {', '.join(written)}"


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    return " ".join(word.decode(errors="replace") for word in words).strip() or f"process {pid}"


def _is_long_lived(command: str) -> bool:
    return any(name in command for name in _LONG_LIVED)
