"""Reports and comparisons, made from rows alone."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_rows import made_row
from cli_tools import Capture, assert_one_line_error, call_rt
from facts import assert_facts, has_fact, raises_with
from PIL import Image

from zimage_rt.bench import requirements
from zimage_rt.bench.blocks import Section, Table, Text, to_html
from zimage_rt.bench.cards import Source, _predict, answers, card_table
from zimage_rt.bench.compare import compare_rows
from zimage_rt.bench.jobs import open_bundles
from zimage_rt.bench.plots import plots
from zimage_rt.bench.report import write_report
from zimage_rt.bench.results import append_row
from zimage_rt.bench.schema import Row, absent
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import RequestError
from zimage_runtime.executors.overheads import CARD

GIB = 1 << 30
ROWS = [
    made_row("a"),
    made_row("b", size=(128, 64), totals=(3.0, 3.2, 3.1)),
    made_row("c", "tiny-bf16", failure="20.0 dB from fp32, bf16 must reach 25 dB", precision="bf16", peak=7 << 30),
    made_row("d", "tiny-int8", totals=()),
]


def unchecked(row: Row) -> Row:
    assert row.accuracy is not None
    return replace(
        row, accuracy=replace(row.accuracy, reference=None, psnr_db=absent("the reference failed: out of memory"))
    )


@pytest.fixture(scope="module")
def written(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    (out / "pictures").mkdir()
    Image.effect_noise((64, 64), 80).save(out / "pictures" / "a.png")
    rows = [replace(ROWS[0], picture="pictures/a.png"), *ROWS[1:], unchecked(made_row("e", "unchecked"))]
    write_report(out, rows, open_bundles([str(bundle)]))
    return out


def table_rows(markdown: str, heading: str) -> list[list[str]]:
    part = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def line_with(text: str, fact: str) -> str:
    """The only line of a text that has a fact."""
    (line,) = [line for line in text.splitlines() if has_fact(line, fact)]
    return line


def test_the_summary_says_what_was_measured_and_what_failed(written: Path) -> None:
    rows = {row[0]: row for row in table_rows((written / "report.md").read_text(), "Summary") if row[1] == "64x64"}
    fast, wrong, dead = rows["tiny-fp32 cpu"], rows["tiny-bf16 cpu"], rows["tiny-int8 cpu"]
    assert fast[2] == "1.10 s"
    assert fast[3] == "1.26 s"  # numpy.quantile([1, 1.1, 1.2, 1.05, 1.3], 0.9)
    assert fast[4] == "4.55"  # a step is a fifth of a picture
    assert fast[5] == "54.5"
    assert fast[6] == "3.10 s (warm)"
    assert fast[7] == "3.00 GiB"
    assert fast[8:] == ["50 %", "41.5 dB", "ok"]
    assert wrong[-1] == "failed"
    assert dead[2:] == ["–"] * 8 + ["failed"]
    assert_facts(rows["unchecked cpu"][-1], "not checked", "the reference failed")
    text = (written / "report.md").read_text()
    assert str(ROWS[2].failure) in text
    assert_facts(line_with(text, "5 cases"), "2 failed", "1 row not checked", "the reference failed")
    assert_facts(line_with(text, "the reference failed: out of memory"), "unchecked cpu 64x64")


def test_a_report_whose_rows_are_all_checked_says_nothing_of_checking(bundle: Path, tmp_path: Path) -> None:
    write_report(tmp_path, ROWS[:2], open_bundles([str(bundle)]))
    text = (tmp_path / "report.md").read_text()
    assert_facts(line_with(text, "2 cases"), "none failed")
    assert "not checked:" not in text


def test_the_page_is_whole_html_and_marks_the_failed_rows(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert page.count("<tr class=failed>") == 2
    assert page.count("data:image/svg+xml;base64,") == 4
    assert page.count("data:image/png;base64,") == 1
    for tag in ("table", "tr", "td", "figure", "section", "div", "p"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_text_from_rows_cannot_break_the_page() -> None:
    evil = '<script>alert("|")</script>'
    page = to_html(evil, [Section(evil, (Text(evil), Table((evil,), ((evil,),))))])
    assert "<script>" not in page


def test_a_value_that_is_missing_is_named_with_its_reason_and_never_0(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "no NVIDIA GPU" in text
    assert "| 0 |" not in text


@pytest.mark.deep
def test_plots_are_valid_svg_and_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    first, second = plots(ROWS), plots(ROWS)
    assert set(first) == {"latency-memory", "stages", "memory", "size"}
    assert first == second
    for _, svg in first.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "size" not in plots(ROWS[:1])
    assert plots([ROWS[3]]) == {}


def test_without_the_extra_measuring_is_refused_and_comparing_is_not(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, rows in (("a", SLOW), ("b", FAST)):
        append_row(tmp_path / name, rows[0])
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    for words in ((), ("--report-only",)):
        outcome = call_rt(capsys, "bench", *words, "--out", tmp_path / "out")
        assert_one_line_error(outcome, "matplotlib", "flip-evaluator", "pip install 'zimage-rt[report]'")
    assert not (tmp_path / "out").exists()
    assert call_rt(capsys, "bench", "--compare", tmp_path / "a", tmp_path / "b").status == 0
    assert call_rt(capsys, "bench", "--help").status == 0


def test_only_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "flip_evaluator" else name)
    with raises_with(RequestError, "flip-evaluator", "pip install 'zimage-rt[report]'") as refusal:
        requirements.require_extra()
    assert "matplotlib" not in str(refusal.value)


def test_cards_are_answered_from_the_plan_and_then_from_the_measurement(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    predict = _predict(opened, "cpu", (64, 64))
    for answer in answers(predict, None, cards=(1, 6)):
        assert (answer.fits, answer.source) == (True, Source.PREDICTED)
        assert answer.peak is not None
        assert 100 << 20 < answer.peak < GIB
    small, large = answers(predict, 2 * GIB, cards=(1, 6))
    assert small.source is Source.PREDICTED, "what was measured with everything loaded does not fit; a plan does"
    assert small.fits
    assert (large.source, large.peak) == (Source.MEASURED, 2 * GIB)


def test_a_card_that_is_too_small_cannot(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (answer,) = answers(_predict(opened, "cpu", (4096, 4096)), None, cards=(1,))
    assert not answer.fits
    assert answer.peak is None
    assert answer.text == "no (predicted)"
    assert CARD.nbytes < GIB


def test_a_peak_within_a_budget_is_no_answer_for_the_card(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    row = made_row("a", fingerprint=opened.manifest.fingerprint)
    (free,) = (r for r in card_table([("m", opened)], [(64, 64)], [row]) if r.executor == "cpu")
    assert {answer.source for answer in free.answers} == {Source.MEASURED}
    held = replace(row, case=replace(row.case, vram=4 * GIB))
    (free,) = (r for r in card_table([("m", opened)], [(64, 64)], [held]) if r.executor == "cpu")
    assert {answer.source for answer in free.answers} == {Source.PREDICTED}


# --- comparisons -----------------------------------------------------------------------------------------------------

SLOW = [made_row("a", totals=[2.0, 2.1, 1.9, 2.05, 1.95], fingerprint="1")]
FAST = [made_row("b", totals=[1.0, 1.02, 0.98, 1.01, 0.99], fingerprint="2")]


def test_a_comparison_gives_ratios_with_intervals() -> None:
    found = compare_rows(SLOW, FAST)
    picture = next(pair for pair in found.pairs if pair.what == "image")
    assert (picture.first, picture.second) == (2.0, 1.0)
    assert picture.times_faster is not None
    assert picture.times_faster.low < 2 < picture.times_faster.high
    assert picture.times_faster.decided
    assert found.warnings == ()


def test_a_comparison_warns_of_other_machines_and_of_load() -> None:
    other = replace(FAST[0], environment={**FAST[0].environment, "cpu": "another"})
    busy = made_row("c", load=3.5)
    assert_facts(compare_rows(SLOW, [other]).warnings[0], "machines")
    assert_facts(compare_rows(SLOW, [busy]).warnings[0], "busy")


def test_cases_without_a_partner_are_named() -> None:
    found = compare_rows([*SLOW, made_row("x", "only-here")], [*FAST, made_row("y", size=(128, 128))])
    assert found.only_first == ("only-here cpu 64x64",)
    assert found.only_second == ("tiny-fp32 cpu 128x128",)
    with raises_with(RequestError, "case"):
        compare_rows(SLOW, [made_row("y", size=(128, 128))])


def test_the_command_compares_two_files(tmp_path: Path, capsys: Capture) -> None:
    for name, rows in (("a", SLOW), ("b", FAST)):
        (tmp_path / name).mkdir()
        append_row(tmp_path / name / "results.jsonl", rows[0])
    outcome = call_rt(capsys, "bench", "--compare", tmp_path / "a", tmp_path / "b" / "results.jsonl")
    assert outcome.status == 0
    assert "| tiny-fp32 cpu | 64x64 | image | 2.00 s | 1.00 s | 2.00 |" in outcome.out
    outcome = call_rt(capsys, "bench", "--compare", tmp_path / "a", tmp_path / "b", "--json")
    assert json.loads(outcome.out)["pairs"][0]["times_faster"]["confidence"] == 0.95
    (tmp_path / "b" / "results.jsonl").write_text("{}\n")
    assert_one_line_error(call_rt(capsys, "bench", "--compare", tmp_path / "a", tmp_path / "b"), "line 1", "missing")


def test_a_comparison_takes_no_bundles(capsys: Capture, tmp_path: Path) -> None:
    outcome = call_rt(capsys, "bench", "bundle", "--compare", tmp_path, tmp_path)
    assert_one_line_error(outcome, "--compare", status=2)
