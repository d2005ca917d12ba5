"""How much memory this process may still take."""

from pathlib import Path


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's where that is less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for limit, usage, reclaimable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        left = _control_group_left(_CONTROL_GROUP, limit, usage, reclaimable)
        if left is not None:
            available = min(available, left)
    return available


_CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container sees its own group here


def _control_group_left(root: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most = int((root / limit).read_text())
        used = int((root / usage).read_text())
        statistics = (root / usage).with_name("memory.stat").read_text()
    except (OSError, ValueError):  # no such group, or no limit: the file says "max"
        return None
    for line in statistics.splitlines():
        name, _, value = line.partition(" ")
        if name == reclaimable:
            used -= int(value)
    return max(most - used, 0)
