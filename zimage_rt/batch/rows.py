"""Files of requests, one per row: JSONL, CSV, TSV or Parquet. What cannot be read is reported by its line."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runtime.errors import RequestError

from .parquet import pyarrow_parquet

MOST_CELL = 1 << 20
"""Characters of a CSV cell: far more than a row can use, so that a quote that is never closed ends somewhere."""


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file."""

    line: int  # from 1; of a Parquet file, the row's number
    values: Mapping[str, Any]  # by the name of the column; what is empty is left out
    textual: bool = False  # values are text, which says what it means by its column alone


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    line: int
    why: str


Read = Row | BadRow


def read_rows(path: Path) -> list[Read]:
    """All rows of a file, in order.

    Raises `RequestError` for a file that cannot be read at all, or holds no row.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RequestError(f"{path}: must be {', '.join(_READERS)}, by its extension")
    try:
        rows = list(reader(path))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise RequestError(f"{path}: holds no rows")
    return rows


def _jsonl(path: Path) -> Iterator[Read]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for line, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_not_finite)
        except UnicodeDecodeError as error:
            yield BadRow(line, f"is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}")
        except RecursionError:
            yield BadRow(line, "is not JSON that can be read: it is nested too deeply")
        except ValueError as error:
            yield BadRow(line, f"is not JSON: {error}")
        else:
            if isinstance(value, dict):
                yield Row(line, {name: one for name, one in value.items() if one is not None})
            else:
                yield BadRow(line, f"must be a JSON object, not {type(value).__name__}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{min(twice)!r} is there twice")
    return dict(pairs)


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _csv(path: Path) -> Iterator[Read]:
    # bytes that are not UTF-8 stay recognizable, so that the other rows can be read
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RequestError(f"{path}: is in UTF-16; save it as UTF-8")
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    before = csv.field_size_limit(MOST_CELL)
    try:
        yield from _cells(path, text, "\t" if path.suffix.lower() == ".tsv" else ",")
    finally:
        csv.field_size_limit(before)


def _cells(path: Path, text: str, delimiter: str) -> Iterator[Read]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield BadRow(line, f"is not CSV: {error}")  # after which nothing can be relied on
            return
        if cells is None:
            return
        if not any(cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(path, header)
        elif len(cells) != len(header):
            yield BadRow(line, f"has {len(cells)} cells, and the first line names {len(header)} columns")
        elif bad := [name for name, cell in zip(header, cells, strict=True) if not _is_text(cell)]:
            yield BadRow(line, f"{bad[0]} is not UTF-8")
        else:
            yield Row(line, {n: cell for n, cell in zip(header, cells, strict=True) if cell}, textual=True)


def _check_header(path: Path, header: list[str]) -> None:
    if twice := {name for name in header if header.count(name) > 1}:
        raise RequestError(f"{path}: the first line names the column {min(twice)!r} twice")


def _is_text(cell: str) -> bool:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path) -> Iterator[Read]:
    parquet = pyarrow_parquet()
    with path.open("rb") as file:
        try:
            rows = parquet.read_table(file).to_pylist()
        except OSError as error:
            if error.errno:
                raise
            raise RequestError(f"{path}: is not a Parquet file: {error}") from None
        except (ValueError, ArithmeticError) as error:  # pyarrow's own errors are of these classes
            raise RequestError(f"{path}: is not a Parquet file: {error}") from None
    for number, row in enumerate(rows, 1):
        yield Row(number, {name: value for name, value in row.items() if value is not None})


_READERS: dict[str, Callable[[Path], Iterator[Read]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
