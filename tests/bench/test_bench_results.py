"""Rows on the disk: written whole, read back, refused with one clear line, and never measured twice."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_rows import made_row
from facts import raises_with

from zimage_rt.bench.results import ResultsError, append_row, read_rows, results_file
from zimage_rt.bench.schema import SCHEMA, Draw, Reading, Row
from zimage_runtime.checked_json import from_document, to_document
from zimage_runtime.errors import ConfigError


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [made_row("a"), made_row("b", failure="the picture is constant"), made_row("c", totals=())]
    for row in rows:
        append_row(tmp_path / "results.jsonl", row)
    assert read_rows(results_file(tmp_path)) == rows


def test_a_case_that_was_measured_again_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, other = made_row("a"), made_row("b")
    second = replace(first, started="later")
    for row in (first, other, second):
        append_row(path, row)
    assert read_rows(path) == [second, other]


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_line_that_an_interrupt_cut_is_left_out_and_overwritten(left: int, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_row(path, made_row("a"))
    append_row(path, made_row("b"))
    text = path.read_bytes()
    second = text.index(b"\n") + 1
    path.write_bytes(text[: second + left] if left > 0 else text[:left])  # -1: only its newline is missing
    if left > 0:
        assert [row.key for row in read_rows(path)] == ["a"]
    append_row(path, made_row("c"))
    assert [row.key for row in read_rows(path)] == ["a", "c"]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"schema": SCHEMA + 1}, ["upgrade zimage-rt"]),
        ({"case": 7}, ["case", "JSON object"]),
        ({"status": None}, ["status", "string"]),
        ({"energy": {"value": None, "reason": None}}, ["energy", "value", "reason"]),
        ({"notes": "none"}, ["notes", "list"]),
    ],
)
def test_a_damaged_or_newer_file_is_one_line(change: dict[str, Any], facts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(to_document(made_row("a")) | change) + "\n")
    with raises_with(ResultsError, path, "line 1", *facts):
        read_rows(path)


def test_a_line_in_the_middle_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("{\n" + json.dumps(to_document(made_row("a"))) + "\n")
    with raises_with(ResultsError, path, "line 1", "JSON"):
        read_rows(path)


def test_no_file_says_what_writes_one(tmp_path: Path) -> None:
    with raises_with(ResultsError, tmp_path / "missing", "zimage-rt bench"):
        read_rows(results_file(tmp_path / "missing"))


def test_unknown_keys_of_a_later_minor_version_are_ignored() -> None:
    document = to_document(made_row("a")) | {"more": 1}
    assert from_document(Row, json.loads(json.dumps(document)), "row") == made_row("a")


@pytest.mark.parametrize("value", [True, "1.0", None, [1.0]])
def test_a_number_must_be_one(value: object) -> None:
    document = {"total": value, "text": None, "steps": [], "decode": None, "save": 0.0}
    with raises_with(ConfigError, "draw:", "total", "number"):
        from_document(Draw, document, "draw")


@pytest.mark.parametrize(("value", "reason"), [(1.0, "why"), (None, None)])
def test_a_reading_has_a_value_or_a_reason(value: float | None, reason: str | None) -> None:
    with raises_with(ValueError, "value", "reason"):
        Reading(value, reason)


def test_every_part_of_a_case_and_the_setup_make_the_key() -> None:
    case = made_row("a").case
    others = [
        replace(case, system="diffusers"),
        replace(case, fingerprint="0"),
        replace(case, width=96),
        replace(case, steps=9),
        replace(case, seed=1),
        replace(case, prompt="b"),
        replace(case, repeat=7),
        replace(case, low_memory=True),
        replace(case, drop_cache=True),
        replace(case, threads=3),
        replace(case, vram=8 << 30),
        replace(case, vram=4 << 30),
    ]
    keys = {one.key("setup") for one in (case, *others)} | {case.key("another setup")}
    assert len(keys) == len(others) + 2
    assert replace(case).key("setup") == case.key("setup")


def test_a_case_without_a_budget_keeps_the_key_that_it_had_before_there_were_budgets() -> None:
    """What was measured then is not measured again."""
    case = made_row("a").case
    document = {name: value for name, value in vars(case).items() if name != "vram"}
    text = json.dumps([document, "setup"], sort_keys=True)
    assert case.key("setup") == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert replace(case, vram=8 << 30).label == f"{case.label} in 8 GiB"
