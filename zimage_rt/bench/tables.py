"""Tables and numbers as text."""

from collections.abc import Sequence

from .schema import Reading


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are numbers, aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


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
