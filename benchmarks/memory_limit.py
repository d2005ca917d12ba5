"""A memory control group: a command inside it has no more memory than a smaller machine would have. Linux, as root."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import getpid
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@dataclass
class Limit:
    """A limit on heap, mapped files and page cache together, as a machine's memory limits them."""

    allowed: int
    group: Path
    usage: dict[str, int] = field(default_factory=dict)  # filled in when the group is given up

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, inside the group from its first instruction."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.group), *command]


@contextmanager
def memory_limit(allowed: int) -> Iterator[Limit]:
    """Makes a group that may use `allowed` bytes. Raises `OSError` where groups cannot be made."""
    first = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if first else _V2) / f"zimage-rt-{getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(allowed))
        if (swap := group / ("memory.memsw.limit_in_bytes" if first else "memory.swap.max")).exists():
            swap.write_text(str(allowed if first else 0))
        limit = Limit(allowed, group)
        yield limit
        limit.usage = _usage(group)
    finally:
        group.rmdir()


def _usage(group: Path) -> dict[str, int]:
    """The most bytes that were charged to the group, and how often it met its limit; of which the kernel tells."""
    files = {
        "peak_bytes": (group / "memory.max_usage_in_bytes", group / "memory.peak"),
        "reclaims_at_the_limit": (group / "memory.failcnt",),
    }
    found = ((name, path) for name, paths in files.items() for path in paths if path.exists())
    return {name: int(path.read_text()) for name, path in found}
