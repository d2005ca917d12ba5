"""Reading JSON objects field by field, so that a wrong value is named with its file and its key."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

_LONGEST_LIST = 64


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold halves of surrogate pairs, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Fields:
    """A JSON object and where it came from; each getter returns a checked value or raises `ConfigError`."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, found {type(data).__name__}")
        self._data: Mapping[str, Any] = data
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._data.get(key) is not None

    def names(self) -> list[str]:
        """The keys present, in file order."""
        return list(self._data)

    def fail(self, key: str, expected: str) -> ConfigError:
        """The error for a wrong value: the caller raises it."""
        # reprlib, for a file may nest more deeply than repr can follow
        found = reprlib.repr(self._data[key])[:80] if key in self._data else "nothing"
        return ConfigError(f"{self.where}: {key} must be {expected}, found {found}")

    def _get(self, key: str, default: object) -> object:
        value = self._data.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**63 - 1) -> int:
        """An integer from `minimum` to `maximum`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            limit = "" if maximum >= 2**63 - 1 else f" and at most {maximum}"
            raise self.fail(key, f"an integer of at least {minimum}{limit}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number, above zero unless `positive` is off."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or (positive and number <= 0):
            raise self.fail(key, "a finite number" + (" above zero" if positive else ""))
        return number

    def text(self, key: str, default: str | None = None) -> str:
        """A string that is not empty."""
        value = self._get(key, default)
        if not isinstance(value, str) or not value:
            raise self.fail(key, "a non-empty string")
        if not is_unicode(value):
            raise self.fail(key, "valid Unicode")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, or None where the key is absent or null."""
        return self.text(key) if key in self else None

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def integers(self, key: str, length: int | None = None) -> tuple[int, ...]:
        """A list of at most 64 positive integers, of the given length if one is given."""
        value = self._data.get(key)
        if (
            not isinstance(value, list | tuple)
            or not value
            or len(value) > _LONGEST_LIST
            or (length is not None and len(value) != length)
            or not all(isinstance(item, int) and not isinstance(item, bool) and 0 < item < 2**63 for item in value)
        ):
            raise self.fail(key, f"a list of {length or 'one or more'} positive integers")
        return tuple(value)

    def object(self, key: str) -> "Fields":
        """A nested object."""
        if key not in self:
            raise self.fail(key, "a JSON object")
        return Fields(self._data[key], f"{self.where}: {key}")

    def raw(self, key: str) -> Any:
        """Whatever stands there, unchecked; None where nothing does."""
        return self._data.get(key)
