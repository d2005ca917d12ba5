"""How much memory this process may still use: the machine's, or what the strictest of its control groups leaves."""

from .control_group import memory_limits


def available_memory() -> int:
    """Bytes that this process may still use."""
    import psutil

    of_machine = int(psutil.virtual_memory().available)
    return min([of_machine, *(group.left for group in memory_limits())])


def control_group_limit() -> int | None:
    """The least limit, in bytes, that a control group sets below the machine's memory; None where there is none."""
    import psutil

    limit = min((group.limit for group in memory_limits()), default=None)
    return limit if limit is not None and limit < int(psutil.virtual_memory().total) else None
