"""Scripts in `benchmarks`: the frame that they share; every committed page is made from its committed values."""

import ast
import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from facts import raises_with

from zimage_rt.bench import children
from zimage_rt.bench.script import RESULTS, Document, Option, Run, Script
from zimage_rt.bench.tables import column_table
from zimage_rt.bench.timing import interleave, ratio

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when a script is run; modules of benchmarks are forgotten afterwards."""
    before = set(sys.modules)
    for folder in ("tests", ".", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def scripts() -> list[str]:
    """Those on the frame: what states a `Script`."""
    found = []
    for path in BENCHMARKS.glob("*.py"):
        names = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.Assign)]
        if any(getattr(target, "id", "") == "SCRIPT" for node in names for target in node.targets):
            found.append(path.stem)
    return sorted(found)


def script_of(name: str) -> str:
    """The script that a result says it was made by; empty where it names none."""
    command = json.loads((RESULTS / f"{name}.json").read_text("utf-8")).get("command", "")
    return next((Path(word).stem for word in command.split() if word.startswith("benchmarks/")), "")


def results() -> list[str]:
    """The committed results of scripts on the frame."""
    return sorted(path.stem for path in RESULTS.glob("*.json") if script_of(path.stem) in scripts())


def test_the_results_of_scripts_are_found() -> None:
    assert {"cpu_step", "int8_step", "full_size_bf16", "memory_model", "demo_precisions"} <= set(results())


@pytest.mark.parametrize("name", results())
def test_a_committed_page_is_made_from_its_committed_values(name: str) -> None:
    document = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    script: Script = importlib.import_module(script_of(name)).SCRIPT
    assert (RESULTS / f"{name}.md").read_text("utf-8") == script.text(document).rstrip() + "\n", (
        f"run `python {script.file} --page --name {name}`"
    )


@pytest.mark.parametrize("name", results())
def test_the_command_of_a_committed_result_is_one_that_the_script_takes(name: str) -> None:
    command = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["command"]
    script: Script = importlib.import_module(script_of(name)).SCRIPT
    words = shlex.split(command)
    options = script.parser().parse_args(words[words.index("python") + 2 :])
    options.name = options.name or script.own_name(options)
    assert options.name == name
    assert script.command(options) == command


@pytest.mark.parametrize("name", scripts())
def test_a_script_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script: Script = importlib.import_module(name).SCRIPT
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    said = capsys.readouterr().out
    assert "--page" in said
    assert (script.doc or "").strip().splitlines()[0] in said


def page(document: Document) -> list[str]:
    return ["Sums", column_table({"term": "{a}", "sum": "{sum:.1f}"}, document["rows"])]


def measure(run: Run) -> Document:
    rows = [{"a": a, "sum": a + run.options.more} for a in range(run.rounds)]
    run.keep(rows=rows[:1])
    run.once(run.work / "kept.json", lambda: rows)
    return {"rows": rows}


SCRIPT = Script(
    __file__, "Adds.", measure, page, ("numpy",), work="nothing", rounds=2, options={"more": Option(0.5, "to add")}
)


def test_a_script_writes_its_values_and_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = SCRIPT.main(["--work", str(tmp_path / "w"), "--out", str(tmp_path), "--more", "2", "--name", "sums"])
    assert document is not None
    assert document["rows"] == [{"a": 0, "sum": 2.0}, {"a": 1, "sum": 3.0}]
    script = Path(__file__).name
    assert document["command"] == f"python benchmarks/{script} --work DIR --more 2.0 --name sums"
    written = (tmp_path / "sums.md").read_text()
    assert written.strip() == capsys.readouterr().out.strip()
    assert "| 1 | 3.0 |" in written
    assert f"Made by `{document['command']}`." in written
    assert json.loads((tmp_path / "sums.json").read_text()) == document
    (tmp_path / "sums.md").unlink()
    SCRIPT.main(["--page", "--out", str(tmp_path), "--name", "sums"])
    assert (tmp_path / "sums.md").read_text() == written


def test_what_was_measured_is_on_the_disk_before_the_end(tmp_path: Path) -> None:
    def interrupted(run: Run) -> Document:
        run.keep(rows=[{"a": 1, "sum": 1}])
        raise KeyboardInterrupt

    script = Script(__file__, "", interrupted, page)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--out", str(tmp_path), "--name", "x"])
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [{"a": 1, "sum": 1}]


def test_a_trial_is_not_written_among_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("zimage_rt.bench.script.RESULTS", tmp_path)
    script = Script(__file__, "", lambda run: {"rows": []}, page, trial=True)
    script.main(["--trial", "--name", "x"])
    assert list(tmp_path.iterdir()) == []
    script.main(["--trial", "--name", "x", "--out", str(tmp_path / "other")])
    assert (tmp_path / "other" / "x.md").exists()


def test_without_its_folder_a_script_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        SCRIPT.main([])
    assert "--work" in capsys.readouterr().err


def test_what_is_missing_in_a_row_is_a_dash() -> None:
    rows: list[dict[str, Any]] = [{"a": None, "b": {"c": 1.25}}, {}]
    table = column_table({"x": "{a:.1f}", "y": "{b[c]:.1f}", "z": lambda row: len(row)}, rows)
    assert table.splitlines()[2:] == ["| – | 1.2 | 2 |", "| – | – | 0 |"]


def test_variants_take_turns() -> None:
    calls: list[str] = []
    ticks = iter(range(100))
    taken = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, lambda: next(ticks))
    assert calls == ["a", "b", "a", "b"]
    assert taken == {"a": [1, 1], "b": [1, 1]}
    found = ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert (found.least, found.median, found.most) == (2.0, 3.0, 4.0)


def test_a_child_is_watched_and_its_failure_is_told() -> None:
    fill = "a = bytearray(64 << 20); import time; time.sleep(0.2); print('done')"
    peak, said = children.measure_child([sys.executable, "-c", fill])
    assert said == "done\n"
    assert 64 << 20 < peak.resident < 256 << 20
    with raises_with(RuntimeError, "boom"):
        children.measure_child([sys.executable, "-c", "raise SystemExit('boom')"])


def test_this_process_is_watched() -> None:
    with children.own_peak() as peak:
        block = bytearray(64 << 20)
        import time

        time.sleep(0.1)
        del block
    assert peak.resident > 64 << 20
