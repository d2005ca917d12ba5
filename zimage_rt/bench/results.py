"""``results.jsonl``: one row per line, appended as soon as it is measured, so that a run can be resumed."""

import json
import os
from pathlib import Path
from typing import Any

from zimage_runtime.checked_json import from_document, to_document
from zimage_runtime.errors import ConfigError, ZImageRuntimeError

from .schema import SCHEMA, Row

NAME = "results.jsonl"


class ResultsError(ZImageRuntimeError):
    """A results file is missing, damaged, or written by a newer version."""


def results_file(path: Path) -> Path:
    """The results file that a path names: itself, or the one in the folder."""
    return path / NAME if path.is_dir() else path


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, the last one of each key, in the order in which keys came first.

    A last line that an interrupt cut short is left out. Raises `ResultsError` for anything else that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such results file; zimage-rt bench writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from None
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # no newline after it: it was being written
                continue
            raise ResultsError(
                f"{path}: line {number} is not JSON; remove it, and the case is measured again"
            ) from None
        row = _row(data, f"{path}: line {number}")
        rows[row.key] = row
    return list(rows.values())


def _row(data: Any, where: str) -> Row:
    version = data.get("schema") if isinstance(data, dict) else None
    if type(version) is int and version > SCHEMA:
        raise ResultsError(
            f"{where}: written for schema {version}, this version reads up to {SCHEMA}; upgrade zimage-rt"
        )
    try:
        return from_document(Row, data, where)
    except ConfigError as error:
        raise ResultsError(f"{error}; is this a results file of zimage-rt bench?") from None


def append_row(path: Path, row: Row) -> None:
    """Adds a row, which is on the disk when this returns. A line that an interrupt cut short is removed first."""
    text = json.dumps(to_document(row), ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                _cut_partial_line(file)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _cut_partial_line(file: Any) -> None:
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(0, os.SEEK_END)
