"""The documentation's tables are those of the committed results, and the script that makes them works."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bench_rows import made_row

from zimage_rt.bench.results import append_row

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """benchmarks/bench_report.py, imported as a script beside its helpers would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import bench_report

        yield bench_report
        sys.modules.pop("bench_report", None)


def test_the_tables_show_what_was_committed(script: ModuleType) -> None:
    pages = script.marked_pages()
    assert pages, "no page has the marks between which the tables are"
    wrong = [page.name for page in pages if page.read_text("utf-8") != script.filled(page)]
    assert wrong == [], "run `python benchmarks/bench_report.py --tables`"


@pytest.mark.parametrize(("name", "link"), [("README.md", "(benchmarks/results/"), ("docs/x.md", "(../benchmarks/")])
def test_tables_are_written_between_their_marks_and_nowhere_else(
    script: ModuleType, tmp_path: Path, name: str, link: str
) -> None:
    page, folder = tmp_path / name, tmp_path / "results" / "bench-demo"
    page.parent.mkdir(exist_ok=True)
    (tmp_path / "README.md").write_text("no marks")
    page.write_text("before\n<!-- made by make bench-report -->\nold\n<!-- end -->\nafter\n")
    folder.mkdir(parents=True)
    append_row(folder / "results.jsonl", made_row("a"))
    append_row(folder / "results.jsonl", made_row("b", "tiny-bf16", precision="bf16", failure="wrong"))
    assert script.marked_pages(tmp_path) == [page]
    written = script.filled(page, tmp_path / "results", tmp_path)
    assert written.startswith("before\n")
    assert written.endswith("<!-- end -->\nafter\n")
    assert "| zimage-rt fp32 | 64x64 | 220 ms | 1.10 s | 3.00 GiB | 41.5 dB |" in written
    assert "| zimage-rt bf16 (failed) |" in written
    assert link in written
    assert "old" not in written
