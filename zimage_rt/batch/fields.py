"""From a row to a request. The columns are the fields of `Request`: a new one is a column as soon as it is there.

A row is one image, so `count` and `batch_size` are no columns. Paths are relative to the folder of the file. Text, as
all of CSV is, is read by its field's type.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin

from zimage_runtime.adapters.given import LoraInput
from zimage_runtime.errors import RequestError, ZImageRuntimeError
from zimage_runtime.events import Request

from .rows import Row

ID = "id"
MOST_CHARACTERS = 10_000
"""Of a prompt: of more, the model's 512 tokens see next to nothing, and it is a mistake of whatever wrote the row."""

_MOST_ID = 120  # bytes: file systems allow 255, and names for what is being written are longer
_FORBIDDEN = set('/\\<>:"|?*')  # in file names, on one system or another
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}

_SIZE = re.compile(r"(\d{1,9})\s*[xX×]\s*(\d{1,9})", re.ASCII)
_VARIATION = re.compile(r"(\d{1,20}):(\d{0,9}\.?\d{1,9})", re.ASCII)

COLUMNS: dict[str, Any] = {
    one.name: one.type for one in fields(Request) if one.init and one.name not in ("count", "batch_size")
}
"""The fields of a row beside its id, with their types."""


@dataclass(frozen=True)
class RowRequest:
    """What a row asks for: an id, and the arguments of `Request` as JSON holds them, with a seed."""

    id: str
    values: Mapping[str, Any]

    def request(self) -> Request:
        """Raises `RequestError`."""
        values = dict(self.values)
        for name in ("size", "variation"):
            if name in values:
                values[name] = tuple(values[name])
        if "loras" in values:
            values["loras"] = [one if isinstance(one, str) else tuple(one) for one in values["loras"]]
        return Request(**values)

    def document(self) -> str:
        """The row as JSON, the same for the same request."""
        return _canonical(self.values)


def row_request(row: Row, folder: Path) -> RowRequest:
    """The request of a row. Paths are relative to `folder`.

    Without an id, a row gets one from what it asks for; without a seed, one from its id and what it asks for: the same
    each time. Raises `RequestError`.
    """
    unknown = [name for name in row.values if name not in COLUMNS and name != ID and not name.startswith("_")]
    if unknown:
        raise RequestError(f"{unknown[0]!r} is no field of a request; {_hint(unknown[0])}")
    if "prompt" not in row.values and not row.textual:
        raise RequestError("prompt is missing")
    values: dict[str, Any] = {"prompt": ""}
    for column, value in row.values.items():
        if column in COLUMNS:
            values[column] = _value(column, value, row, folder)
    for column in ("prompt", "negative"):
        text = values.get(column)
        if isinstance(text, str) and len(text) > MOST_CHARACTERS:
            raise RequestError(f"{column} has {len(text)} characters; the most is {MOST_CHARACTERS}")
    try:
        digest = hashlib.sha256(_canonical(values).encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise RequestError(f"contains {error.object[error.start]!a}, which is no character") from None
    own = _checked_id(row.values[ID]) if ID in row.values else digest[:12]
    if "seed" not in values:
        seeded = hashlib.sha256(f"{own}\n{digest}".encode()).digest()
        values["seed"] = int.from_bytes(seeded[:4], "big")
    found = RowRequest(own, values)
    found.request()
    return found


def folded(name: str) -> str:
    """An id as file systems compare names that ignore case."""
    return unicodedata.normalize("NFC", name).casefold()


def _hint(name: str) -> str:
    if name in ("count", "batch_size"):
        return "a row is one image: write a row for each seed"
    return f"the fields are {', '.join((ID, *COLUMNS))}, and names that begin with _ are yours"


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _checked_id(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise RequestError(f"id must be a name, not {value!r}")
    bad = sorted({character for character in value if character in _FORBIDDEN or not character.isprintable()})
    if bad:
        raise RequestError(f"id must serve as a file's name, and {value[:40]!r} contains {bad[0]!r}")
    if value[0] in ". " or value[-1] in ". " or value.partition(".")[0].lower() in _RESERVED:
        raise RequestError(f"id must serve as a file's name on every system, and {value[:40]!r} does not")
    if len(value.encode()) > _MOST_ID:
        raise RequestError(f"id must have at most {_MOST_ID} bytes, and {value[:40]!r}… has {len(value.encode())}")
    return value


def _value(name: str, value: Any, row: Row, folder: Path) -> Any:
    """A value as JSON holds it, which `RowRequest.request` and `Request` understand."""
    kind = COLUMNS[name]
    if kind == tuple[int, int] | None:
        return _pair(name, value, _SIZE, "1024x768", int)
    if kind == tuple[int, float] | None:
        return _pair(name, value, _VARIATION, "5:0.2", float)
    if kind == Iterable[LoraInput]:
        return _loras(value, folder)
    if _is_path(kind):
        return _path(name, value, folder)
    if row.textual:
        return _from_text(name, value, kind)
    if isinstance(value, float) and value.is_integer() and kind in (int, int | None):
        return int(value)  # pandas writes a column of whole numbers with gaps as floating-point numbers
    if not isinstance(value, str | int | float):
        raise RequestError(f"{name} must be text or a number, not {type(value).__name__}")
    return value


def _from_text(name: str, text: str, kind: Any) -> Any:
    """A cell of CSV, by its field's type."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise RequestError(f"{name} must be true or false, not {text[:40]!r}")
        return text.lower() in ("true", "1")
    for number, words in ((int, "a whole number"), (float, "a number")):
        if kind in (number, number | None):
            try:
                return number(text)
            except ValueError:
                raise RequestError(f"{name} must be {words}, not {text[:40]!r}") from None
    return text


def _pair(name: str, value: Any, form: re.Pattern[str], example: str, second: type[int] | type[float]) -> list[Any]:
    """Two numbers: as text of a form, or as a list."""
    if isinstance(value, list):
        return value
    match = form.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise RequestError(f"{name} must be like {example!r}, not {str(value)[:40]!r}")
    return [int(match[1]), second(match[2])]


def _is_path(kind: Any) -> bool:
    return any(os.PathLike in (one, get_origin(one)) for one in get_args(kind))


def _path(name: str, value: object, folder: Path) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a file's path, not {value!r}")
    return str((folder / value).absolute())


def _loras(value: Any, folder: Path) -> list[Any]:
    """FILE[:WEIGHT], a list of them, or of [FILE, WEIGHT]; in text, several are separated by |."""
    from zimage_runtime.adapters.given import given_loras

    each = value.split("|") if isinstance(value, str) else value
    if not isinstance(each, list):
        raise RequestError(f"loras must be a list of FILE, FILE:WEIGHT or [FILE, WEIGHT], not {value!r}")
    try:
        given = given_loras(tuple(one) if isinstance(one, list) else one for one in each)
    except ZImageRuntimeError:
        raise
    except TypeError:
        raise RequestError(f"loras must be a list of FILE, FILE:WEIGHT or [FILE, WEIGHT], not {value!r}") from None
    found = []
    for one in given:
        here = (folder / one.file).absolute()  # otherwise a name on the Hub, or nothing, which is found out later
        found.append([str(here) if here.exists() else one.file, one.weight])
    return found
