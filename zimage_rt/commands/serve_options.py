"""The values of `zimage-rt serve`'s options: what to keep, keys, and whether a host is this machine alone."""

import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.errors import RequestError

if TYPE_CHECKING:
    from ..serve.settings import Keep

    _KeepParam = click.ParamType[Keep]
else:  # generic since click 8.4 only
    _KeepParam = click.ParamType

_KEEP = re.compile(r"([1-9]\d{0,8})(d?)", re.ASCII)
_SHORTEST_KEY = 8


class KeepType(_KeepParam):
    """N images, or Nd for N days."""

    name = "N|Nd"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Keep":
        """Parses the text."""
        from ..serve.settings import Keep

        match = _KEEP.fullmatch(value)
        if not match:
            self.fail(f"{value[:40]!r} is neither a number of images, like 200, nor of days, like 30d", param, ctx)
        number = int(match[1])
        return Keep(days=number) if match[2] else Keep(count=number)


def api_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and those that begin with # are none.

    Raises `RequestError` for a file that cannot be read, has no key, or has one that is guessed too easily.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise RequestError(f"{path}: is not text in UTF-8") from None
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise RequestError(f"{path}: contains no key; write one on a line of its own")
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise RequestError(f"{path}: a key must have at least {_SHORTEST_KEY} characters")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
