"""Tables and numbers as text."""

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .schema import Reading


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are numbers, aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


class _Cells(string.Formatter):
    """Formats a column's cell; what is missing or null is a dash."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except (KeyError, TypeError):
            return None, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        return "–" if value is None else str(super().format_field(value, format_spec))


Column = str | Callable[[Any], object]
"""What a column shows of a row: a format such as ``{seconds:.2f}`` or ``{peak[file]}``, or a function of the row."""


def column_table(columns: Mapping[str, Column], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table of rows that are JSON objects, its columns by their headers."""
    cells = _Cells()
    lines = [[c(row) if callable(c) else cells.vformat(c, (), row) for c in columns.values()] for row in rows]
    return markdown_table(list(columns), lines)


def mib(size: float) -> int:
    """Bytes in MiB, rounded."""
    return round(size / 2**20)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def seconds(value: float | None) -> str:
    """A time with three significant digits: 12.3 s, 1.23 s, 12.3 ms."""
    if value is None:
        return "–"
    if value >= 0.9995:
        return f"{digits(value)} s"
    return f"{digits(value * 1e3)} ms"


def digits(value: float) -> str:
    """A number with at least three significant digits and no exponent."""
    for limit, places in ((0.0995, 4), (0.9995, 3), (9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{places}f}"
    return f"{value:.0f}"


def gibibytes(value: float | None) -> str:
    """Bytes in GiB, or MiB below one."""
    if value is None:
        return "–"
    return f"{digits(value / 2**30)} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def size_of(reading: Reading) -> str:
    """A reading in bytes as text."""
    return gibibytes(reading.value)
