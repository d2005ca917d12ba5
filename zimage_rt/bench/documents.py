"""Dataclasses to JSON and back, checked: a damaged or newer results file is one clear line, never a traceback."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union

from zimage_runtime.errors import ZImageRuntimeError

T = TypeVar("T")


class DocumentError(ZImageRuntimeError):
    """A results file holds something else than its schema allows."""


def to_document(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_document(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_document(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_document(item) for item in value]
    return value


def from_document(kind: type[T], data: object, where: str) -> T:
    """A dataclass of `kind` from what JSON gave. Unknown keys are ignored. Raises `DocumentError`."""
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
        if not isinstance(data, list):
            raise _wrong(where, "a list", data)
        if arguments[-1] is Ellipsis:
            return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
        if len(data) != len(arguments):
            raise _wrong(where, f"{len(arguments)} values", data)
        return tuple(_read(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, data, strict=True)))
    if origin is dict:
        if not isinstance(data, dict):
            raise _wrong(where, "an object", data)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    return _read_plain(kind, data, where)


def _read_plain(kind: type, data: Any, where: str) -> Any:
    if kind is float and type(data) in (int, float):
        return float(data)
    if type(data) is not kind:  # which also keeps true from being the integer 1
        raise _wrong(where, {"str": "a string", "bool": "true or false"}.get(kind.__name__, "a number"), data)
    return data


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(where, "an object", data)
    hints, values = _hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in data:
            values[field.name] = _read(hints[field.name], data[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DocumentError(f"{where}: {field.name} is missing; is this a results file of zimage-rt bench?")
    try:
        return kind(**values)
    except ValueError as error:
        raise DocumentError(f"{where}: {error}") from None


def _wrong(where: str, expected: str, found: object) -> DocumentError:
    return DocumentError(f"{where} must be {expected}, found {repr(found)[:60]}")
