"""Two result files side by side: the same cases, ratios of medians, and how far their spread decides."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zimage_runtime.errors import RequestError

from .environment import describe
from .schema import OK, Case, Draw, Row
from .statistics import FEWEST, Interval, ratio_of_medians, summarize
from .tables import markdown_table, seconds


@dataclass(frozen=True)
class Compared:
    """One quantity of one case in both files, in seconds. `times_faster` is A / B: above 1, B is faster."""

    case: str
    size: str
    what: str
    first: float
    second: float
    times_faster: Interval | None  # None for fewer than three values in A or B
    first_status: str
    second_status: str


@dataclass(frozen=True)
class Comparison:
    """All that can be compared, and what may make it incomparable."""

    pairs: tuple[Compared, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    warnings: tuple[str, ...]


def compare_rows(first: Sequence[Row], second: Sequence[Row]) -> Comparison:
    """Pairs rows of the same case; only the model's bytes may differ. Raises `RequestError` where nothing pairs up."""
    ours, theirs = _by_question(first), _by_question(second)
    shared = [question for question in ours if question in theirs]
    if not shared:
        raise RequestError("the two results share no case: same system, model name, executor, size, steps and prompt")
    pairs = [pair for question in shared for pair in _compare(ours[question], theirs[question])]
    return Comparison(
        pairs=tuple(pairs),
        only_first=tuple(_name(ours[question].case) for question in ours if question not in theirs),
        only_second=tuple(_name(theirs[question].case) for question in theirs if question not in ours),
        warnings=_warnings(first, second),
    )


def _by_question(rows: Sequence[Row]) -> dict[Case, Row]:
    return {replace(row.case, fingerprint="", repeat=1, warmup=1): row for row in rows}


def _name(case: Case) -> str:
    return f"{case.label} {case.size}"


def _compare(first: Row, second: Row) -> list[Compared]:
    if first.times is None or second.times is None:
        return []
    found = []
    for what, pick in _QUANTITIES.items():
        a, b = (_values(row.times.draws, pick) for row in (first, second) if row.times is not None)
        if a and b:
            found.append(
                Compared(
                    case=first.case.label,
                    size=first.case.size,
                    what=what,
                    first=summarize(a).median,
                    second=summarize(b).median,
                    times_faster=ratio_of_medians(a, b),
                    first_status=first.status,
                    second_status=second.status,
                )
            )
    return found


_QUANTITIES = {"image": "total", "text": "text", "step": "steps", "decode": "decode"}


def _values(draws: Sequence[Draw], pick: str) -> list[float]:
    found: list[float] = []
    for draw in draws:
        value = getattr(draw, pick)
        # steps of one image are not independent of each other: an image's mean is one value
        found += [sum(value) / len(value)] if isinstance(value, tuple) and value else []
        found += [value] if isinstance(value, float) else []
    return found


def _warnings(first: Sequence[Row], second: Sequence[Row]) -> tuple[str, ...]:
    found = []
    machines = [{describe({**row.environment, "packages": {}}) for row in rows} for rows in (first, second)]
    if machines[0] != machines[1]:
        found.append("measured on different machines: a ratio compares the machines as well as the versions")
    for rows, name in ((first, "A"), (second, "B")):
        loads = [row.conditions.get("before", {}).get("load_average") for row in rows]
        busy = [load for load in loads if isinstance(load, int | float) and load > 1.5]
        if busy:
            found.append(f"{name} was measured on a busy machine (load up to {max(busy):.1f} before a case)")
    return tuple(found)


def comparison_table(comparison: Comparison, first: str, second: str) -> str:
    """The comparison as text."""
    rows = [
        [
            f"{pair.case}{_mark(pair)}",
            pair.size,
            pair.what,
            seconds(pair.first),
            seconds(pair.second),
            f"{pair.first / pair.second:.2f}",
            _interval(pair.times_faster),
        ]
        for pair in comparison.pairs
    ]
    lines = [
        f"A: {first}",
        f"B: {second}",
        "",
        markdown_table(["case", "size", "what", "A", "B", "A / B (above 1: B is faster)", "95 % interval"], rows),
        "",
        "Medians. The interval is a bootstrap of both series. It covers the spread within one process, not between "
        "processes.",
        *(f"Only in A: {name}" for name in comparison.only_first),
        *(f"Only in B: {name}" for name in comparison.only_second),
        *(f"Warning: {warning}" for warning in comparison.warnings),
    ]
    return "\n".join(lines)


def _mark(pair: Compared) -> str:
    failed = [name for name, status in (("A", pair.first_status), ("B", pair.second_status)) if status != OK]
    return f" (failed in {' and '.join(failed)})" if failed else ""


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return f"fewer than {FEWEST} values"
    verdict = "" if interval.decided else ", undecided"
    return f"{interval.low:.2f} to {interval.high:.2f}{verdict}"
