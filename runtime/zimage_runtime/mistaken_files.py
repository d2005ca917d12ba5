"""Files that are not what their names say: what a clone without Git LFS or a failed download leaves behind."""

from pathlib import Path

HEAD_BYTES = 512
"""How much of a file's beginning is enough to recognize it."""

_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def mistaken_for(head: bytes) -> str | None:
    """What a file is instead of weights or JSON, and what to do, from its first `HEAD_BYTES`; None if not known.

    The text completes the sentence "FILE: …".
    """
    start = head[:HEAD_BYTES].removeprefix(_BYTE_ORDER_MARK).lstrip().lower()
    if start.startswith(_LFS):
        return "is a Git LFS pointer, not the file: run `git lfs pull`"
    if start.startswith((b"<!doctype html", b"<html")) or (start.startswith(b"<?xml") and b"<html" in start):
        return "is an HTML page, probably a login or error page: download it again"
    return None


def mistaken_file(path: Path) -> str | None:
    """As `mistaken_for`, for a file on the disk. A file that cannot be read is not known."""
    try:
        with path.open("rb") as file:
            return mistaken_for(file.read(HEAD_BYTES))
    except (OSError, ValueError):
        return None
