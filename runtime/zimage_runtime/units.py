"""Amounts of memory as people read them. What is needed rounds up and what is free rounds down, so that a message
never claims that a request needs no more than there is.
"""

_GIB = 2**30


def gib(nbytes: float, digits: int = 1) -> str:
    """Bytes in GiB, rounded to nearest: "1.5 GiB"."""
    return f"{nbytes / _GIB:.{digits}f} GiB"


def gib_needed(nbytes: int, digits: int = 1) -> str:
    """Bytes in GiB, rounded up, so that the amount named is enough."""
    return _exact(-(-nbytes * 10**digits // _GIB), digits)


def gib_free(nbytes: int, digits: int = 1) -> str:
    """Bytes in GiB, rounded down, so that the amount named is there."""
    return _exact(nbytes * 10**digits // _GIB, digits)


def _exact(parts: int, digits: int) -> str:
    return f"{parts / 10**digits:.{digits}f} GiB"
