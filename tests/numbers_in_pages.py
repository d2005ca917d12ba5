"""Numbers in the documentation, tied to committed results by comments that Markdown does not show.

    1.4 times<!-- cpu_step: parts/what=step&size=256x256/rows/variant=diffusers eager fp32/over/ours fp32/1 -->

A comment directly behind a number, or its unit, says where the number comes from: NAME: PATH, of
``benchmarks/results/NAME.json``, or of NAME's rows where it is a folder of ``zimage-rt bench``. PATH's steps are keys,
places in lists (``1``, ``-1``), what an element must have (``size=256x256``, several joined by ``&``), and
``median``, ``min``, ``max``, ``count`` or ``mean`` of a list of numbers. ``PATH over PATH`` divides two values of one
file, and ``PATH minus PATH`` subtracts them. Of a range, the number that has the unit is compared.
A NAME that ends in ``.py`` is a file of the repository, and PATH a constant in it: a gate that a test enforces.
``at most`` or ``at least`` before NAME turns the number into a bound of the value; otherwise the value, in the unit and
to the digits that are shown, must be the number.
"""

import ast
import contextlib
import json
import operator
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

UNITS = {
    **{"ms": 1e3, "s": 1.0, "seconds": 1.0, "minutes": 1 / 60},
    **{"GB": 1e-9, "MB": 1e-6, "GiB": 2.0**-30, "MiB": 2.0**-20, "%": 100.0},
    **{"times": 1.0, "dB": 1.0, "TFLOP/s": 1e-12, "GFLOP/s": 1e-9},
}
"""What a value in the results is multiplied by to be in the unit that stands behind the number."""

_NUMBER = r"(?<![\w.#/=-])(\d+(?:\.\d+)?(?:e-?\d+)?)"
_UNIT = rf"(?: ?({'|'.join(sorted(map(re.escape, UNITS), key=len, reverse=True))})(?![\w/]))?"
_TIED = re.compile(rf"{_NUMBER}{_UNIT}\**<!-- (.+?) -->")
_WITH_UNIT = re.compile(_NUMBER + _UNIT.removesuffix("?"))
_NO_TEXT = re.compile(r"```.*?```|<!-- [^>]*made by [^>]*-->.*?<!-- end -->|`[^`\n]*`|\]\([^)\n]*\)", re.S)
_AGGREGATES = {
    "median": statistics.median,
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "count": len,
}


@dataclass(frozen=True)
class Number:
    """A number on a page, and where it is said to come from."""

    text: str  # with its unit
    shown: float
    scale: float
    half_digit: float  # half of its last digit
    source: str

    def wrong(self) -> str | None:
        """Why it is not the value of its source; None where it is."""
        bound, source = "", self.source
        for words in ("at most", "at least"):
            if source.startswith(f"{words} "):
                bound, source = words, source.removeprefix(f"{words} ")
        value = value_of(source) * self.scale
        if bound == "at most":
            right = value <= self.shown
        elif bound == "at least":
            right = value >= self.shown
        else:
            right = abs(value - self.shown) <= self.half_digit * (1 + 1e-9)
        return None if right else f"{self.text}: {self.source} is {value:.6g}"


def tied_numbers(page: str) -> list[Number]:
    """The numbers of a page that have a source."""
    found = []
    for match in _TIED.finditer(page):
        number, unit, source = match.groups()
        digits, _, exponent = number.partition("e")
        place = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
        found.append(Number(match[0].partition("<")[0], float(number), UNITS.get(unit, 1.0), place / 2, source.strip()))
    return found


def untied_numbers(page: str, stated: tuple[str, ...]) -> list[str]:
    """Numbers with a unit that have no source, each with the text before it, but for those inside of `stated`."""
    for phrase in stated:
        page = phrase_pattern(phrase).sub(lambda match: " " * len(match[0]), page)
    text = _NO_TEXT.sub(lambda match: " " * len(match[0]), page)
    tied = [match.span() for match in _TIED.finditer(text)]
    return [
        re.sub(r"<!--.*?-->", "", text[max(0, match.start() - 60) : match.end()].replace("\n", " ")).strip()
        for match in _WITH_UNIT.finditer(text)
        if not any(start <= match.start() < end for start, end in tied)
    ]


def phrase_pattern(phrase: str) -> re.Pattern[str]:
    """Finds a phrase however its lines are broken."""
    return re.compile(r"\s+".join(map(re.escape, phrase.split())))


def value_of(source: str) -> float:
    """The value that ``NAME: PATH`` names. Raises `LookupError` where there is none."""
    name, _, path = source.partition(": ")
    if name.endswith(".py"):
        return _constant(ROOT / name, path)
    document = _document(name)
    for word, combine in (("over", operator.truediv), ("minus", operator.sub)):
        parts = path.split(f" {word} ")
        for cut in range(1, len(parts)):  # a key may have the word in it
            sides = (f" {word} ".join(side) for side in (parts[:cut], parts[cut:]))
            with contextlib.suppress(LookupError, TypeError, ValueError):
                return float(combine(*(_walked(document, side) for side in sides)))
    return _walked(document, path)


def _document(name: str) -> Any:
    rows = RESULTS / name / "results.jsonl"
    if rows.exists():
        return [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def _walked(document: Any, path: str) -> float:
    value = document
    for step in path.strip().split("/"):
        if isinstance(value, list):
            value = _element(value, step)
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            raise LookupError(f"{path}: no {step!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LookupError(f"{path}: {value!r} is no number")
    return float(value)


def _element(values: list[Any], step: str) -> Any:
    if step in _AGGREGATES:
        return _AGGREGATES[step]([value for value in values if value is not None])
    if re.fullmatch(r"-?\d+", step):
        return values[int(step)]
    wanted = dict(part.split("=", 1) for part in step.split("&"))
    found = [value for value in values if all(str(_nested(value, key)) == text for key, text in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{step}: {len(found)} elements are so")
    return found[0]


def _nested(value: Any, key: str) -> Any:
    """`case.width` of an element."""
    for part in key.split("."):
        value = value[part]
    return value


def _constant(path: Path, name: str) -> float:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets):
            return float(ast.literal_eval(node.value))
    raise LookupError(f"{path.name}: no constant {name}")


def pages() -> Iterator[Path]:
    """The README and everything in docs."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))
