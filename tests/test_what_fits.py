"""The committed table of what fits is what the plans say today."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from zimage_export.engines.build import add_engines
from zimage_export.synthetic.outline import write_outline
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.machine.gpu_targets import GpuTarget

pytestmark = pytest.mark.deep

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import what_fits

    yield what_fits
    sys.modules.pop("what_fits", None)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8, Precision.INT4])
def test_the_table_is_what_the_plans_say(script: ModuleType, tmp_path: Path, precision: Precision) -> None:
    committed = json.loads((BENCHMARKS / "results" / "what_fits.json").read_text("utf-8"))["answers"]
    expected = [one for one in committed if one["precision"] == precision and one["executor"] != "tensorrt"]
    assert len(expected) == 42
    assert [asdict(one) for one in script.answers_for(write_outline(tmp_path / "outline", precision))] == expected


@pytest.mark.slow
def test_the_table_for_tensorrt_is_what_the_plans_say(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    committed = json.loads((BENCHMARKS / "results" / "what_fits.json").read_text("utf-8"))["answers"]
    expected = [one for one in committed if (one["precision"], one["executor"]) == ("fp16", "tensorrt")]
    bundle = add_engines(write_outline(tmp_path / "outline", Precision.FP16), [GpuTarget.SM86])
    found = [asdict(one) for one in script.answers_for(bundle) if one.executor == "tensorrt"]
    assert [one | {"peak": None} for one in found] == [one | {"peak": None} for one in expected]
    for here, there in zip(found, expected, strict=True):  # scratch differs a little from one release to the next
        assert (here["peak"] or 0) == pytest.approx(there["peak"] or 0, rel=0.02)


def test_the_readme_has_the_committed_table(script: ModuleType) -> None:
    committed = json.loads((BENCHMARKS / "results" / "what_fits.json").read_text("utf-8"))
    readme = script.README.read_text("utf-8")
    assert script.readme_tables(committed) in readme
    assert script.filled(readme, committed) == readme, "run `python benchmarks/what_fits.py --work DIR`"
