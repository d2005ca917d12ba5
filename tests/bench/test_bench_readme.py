"""The README's numbers are those of the committed results, and the script that makes them works."""

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
        for name in ("bench_report", "common", "cpu_step"):
            sys.modules.pop(name, None)


def test_the_readme_shows_what_was_committed(script: ModuleType) -> None:
    found = script.block_in(script.README.read_text("utf-8"))
    assert found == script.readme_block(), "run `python benchmarks/bench_report.py --readme`"


def test_the_block_is_written_between_its_marks_and_nowhere_else(script: ModuleType, tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results" / "bench-demo"
    text = "before\n<!-- made by make bench-report -->\nold\n<!-- end -->\nafter\n"
    readme.write_text(text)
    folder.mkdir(parents=True)
    append_row(folder / "results.jsonl", made_row("a"))
    append_row(folder / "results.jsonl", made_row("b", "tiny-bf16", precision="bf16", failure="wrong"))
    script.write_readme(tmp_path / "results", readme)
    written = readme.read_text()
    assert written.startswith("before\n")
    assert written.endswith("<!-- end -->\nafter\n")
    assert "| zimage-rt fp32 | 64x64 | 220 ms | 1.10 s | 3.00 GiB | 41.5 dB |" in written
    assert "| zimage-rt bf16 (failed) |" in written
    assert "old" not in written
    assert script.block_in(written) == script.readme_block(tmp_path / "results")
