"""JSON to checked values, so that a wrong one is named with its file and its key, never with a traceback.

Two ways to read, one set of checks and one wording: `Fields` takes an object key by key, for formats with defaults and
limits of their own; `from_document` fills a dataclass from its type hints, for documents that `to_document` wrote.
"""

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union

from .errors import ConfigError

T = TypeVar("T")

_LONGEST_LIST = 64
_LARGEST = 2**63 - 1


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold halves of surrogate pairs, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(where: str, expected: str, found: str) -> ConfigError:
    return ConfigError(f"{where} must be {expected}, found {found}")


def _shown(value: object) -> str:
    # reprlib, for a file may nest more deeply than repr can follow
    return reprlib.repr(value)[:80]


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _integer(value: object, where: str, minimum: int | None = None, maximum: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not (minimum is None or minimum <= value <= maximum):
        least = "" if minimum is None else f" of at least {minimum}"
        most = "" if maximum == _LARGEST else f" and at most {maximum}"
        raise _wrong(where, f"an integer{least}{most}", _shown(value))
    return value


def _number(value: object, where: str, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(where, "a number", _shown(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0):
        raise _wrong(where, "a finite number" + (" above zero" if positive else ""), _shown(value))
    return number


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "a string", _shown(value))
    if not is_unicode(value):
        raise _wrong(where, "valid Unicode", _shown(value))
    return value


def _boolean(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", _shown(value))
    return value


class Fields:
    """A JSON object and where it came from; each getter returns a checked value or raises `ConfigError`.

    A key that is null counts as absent.
    """

    def __init__(self, data: object, where: str) -> None:
        self._data = _object(data, where)
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._data.get(key) is not None

    def names(self) -> list[str]:
        """The keys present, in file order."""
        return list(self._data)

    def fail(self, key: str, expected: str) -> ConfigError:
        """The error for a wrong value: the caller raises it."""
        return _wrong(self._at(key), expected, _shown(self._data[key]) if key in self._data else "nothing")

    def _at(self, key: str) -> str:
        return f"{self.where}: {key}"

    def _get(self, key: str, default: object, expected: str) -> object:
        value = self._data.get(key)
        if value is None and default is None:
            raise self.fail(key, expected)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = _LARGEST) -> int:
        """An integer from `minimum` to `maximum`."""
        return _integer(self._get(key, default, "an integer"), self._at(key), minimum, maximum)

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number, above zero unless `positive` is off."""
        return _number(self._get(key, default, "a number"), self._at(key), positive=positive)

    def text(self, key: str, default: str | None = None) -> str:
        """A string that is not empty."""
        value = _text(self._get(key, default, "a non-empty string"), self._at(key))
        if not value:
            raise self.fail(key, "a non-empty string")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, or None where the key is absent or null."""
        return self.text(key) if key in self else None

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        return _boolean(self._get(key, default, "true or false"), self._at(key))

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
        return Fields(self._get(key, None, "a JSON object"), self._at(key))

    def raw(self, key: str) -> Any:
        """The value as it is, unchecked; None where there is none."""
        return self._data.get(key)


def to_document(value: Any) -> Any:
    """What JSON can hold: dataclasses and mappings as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_document(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_document(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_document(item) for item in value]
    return value


def from_document(kind: type[T], data: object, where: str) -> T:
    """A dataclass of `kind` from what JSON gave. Unknown keys are ignored. Raises `ConfigError`.

    Fields may be str, int, float, bool, dataclasses, dicts and tuples of these, and each of them or None. A
    `ValueError` of a dataclass's own checks becomes a `ConfigError`.
    """
    return typing.cast(T, _read(kind, data, where))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (one,) = (argument for argument in arguments if argument is not type(None))
        return _read(one, data, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    if origin is tuple:
        return _read_tuple(arguments, data, where)
    if origin is dict:
        return {key: _read(arguments[1], item, f"{where}: {key}") for key, item in _object(data, where).items()}
    return _PLAIN[kind](data, where)


_PLAIN: Mapping[type, Any] = {str: _text, int: _integer, float: _number, bool: _boolean}


def _read_tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _wrong(where, "a list", _shown(data))
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    if len(data) != len(kinds):
        raise _wrong(where, f"a list of {len(kinds)}", _shown(data))
    return tuple(
        _read(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    values, given = {}, _object(data, where)
    for field in dataclasses.fields(kind):
        if field.name in given:
            values[field.name] = _read(_hints(kind)[field.name], given[field.name], f"{where}: {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {field.name} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
