"""The GPU benchmark's measurements give what they should where there is no GPU, on a small model."""

import importlib
import json
import subprocess
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers.models import attention_dispatch

pytestmark = pytest.mark.deep


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    module = importlib.import_module("gpu")
    # in this process: what a process of its own brings is a memory of its own, and seconds
    monkeypatch.setattr(module, "in_child", lambda kind, options, **environment: module.CHILDREN[kind](options))
    return module


@pytest.fixture
def steps(benchmark: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_steps")


def measured(benchmark: ModuleType, tmp_path: Path, *more: str) -> dict[str, list[dict[str, Any]]]:
    """The results by kind, of a trial."""
    words = ["--work", str(tmp_path), "--trial", "--scale", "small", "--size", "64x64", "--steps", "2", "--repeat", "2"]
    benchmark.main([*words, "--images", "2", "--vram", "--out", str(tmp_path / "report"), *more])
    rows = json.loads((tmp_path / "report" / "gpu.json").read_text())["rows"]
    return {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}


@pytest.mark.usefixtures("diffusers_pipeline")  # for its one thread
def test_a_step_beside_diffusers(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark.CHILDREN, "start", lambda options: {"failed": "not here"})
    found = measured(benchmark, tmp_path, "--only", "correctness", "speed", "--precision", "fp32")
    page = capsys.readouterr().out
    assert (tmp_path / "report" / "gpu.md").read_text().strip() == page.strip()
    step = found["steps"][0]["result"]
    assert set(step["seconds"]) == {"ours", "diffusers eager"}
    assert step["over_floor"]["ours"] == pytest.approx(step["seconds"]["ours"] / step["floor_seconds"])
    assert found["parity"][0]["result"]["latents_error"] < 1e-5
    assert {"text_encoder", "caption", "denoiser", "decoder", "encoder"} == set(found["placement"][0]["result"])
    for words in ("64x64: ours", "64x64: diffusers eager", "fp32 denoiser", "its memory mean nothing"):
        assert words in page


def test_the_attention_backend_of_the_process_is_restored(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()
    # the one that is never the default and that a CPU has: measured alone, it is the fastest
    monkeypatch.setattr("gpu_steps.DIFFUSERS_BACKENDS", ("_native_flash",))
    monkeypatch.setitem(benchmark.CHILDREN, "start", lambda options: {"failed": "not here"})
    found = measured(benchmark, tmp_path, "--only", "speed", "--precision", "fp32")
    assert found["steps"][0]["result"]["backend"] == "_native_flash"
    assert registry.get_active_backend() == before


def test_without_diffusers_ours_is_measured(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found_here(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("diffusers", "transformers") else find_spec(name, package)

    monkeypatch.setattr(benchmark, "find_spec", found_here)
    monkeypatch.setattr("zimage_export.synthetic.checkpoint.find_spec", found_here)
    monkeypatch.setitem(benchmark.CHILDREN, "start", lambda options: {"failed": "not here"})
    found = measured(benchmark, tmp_path, "--only", "speed", "--precision", "fp32")
    assert [set(row["result"]["seconds"]) for row in found["steps"]] == [{"ours"}]


def test_int8_is_measured_with_both_of_its_denoisers(benchmark: ModuleType, tmp_path: Path) -> None:
    found = measured(benchmark, tmp_path, "--only", "correctness", "memory", "--precision", "int8")
    for kind in ("pictures", "parity", "placement"):
        assert [row["name"] for row in found[kind]] == ["int8", "int8 weight-only", "int8 blocks"], kind
        assert not [row for row in found[kind] if "failed" in row["result"]]
    planned = [row["result"]["planned_bytes"] for row in found["pictures"]]
    assert planned[1] < planned[0]
    errors = [row["result"]["latents_error"] for row in found["parity"]]
    assert all(1e-4 < error < 0.1 for error in errors)
    assert errors[0] != errors[1]
    assert "int8 weight-only denoiser" in (tmp_path / "report" / "gpu.md").read_text()


def test_what_is_measured_by_default(benchmark: ModuleType) -> None:
    options = benchmark.SCRIPT.parser().parse_args([])
    assert options.size == ["512x512", "1024x1024", "1536x1536"]
    assert (options.executor, options.scale) == (["cuda", "tensorrt", "webgpu"], "full")
    assert options.only == list(benchmark.SECTIONS)


def test_what_diffusers_lacks_costs_its_columns_alone(
    benchmark: ModuleType, steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA error: no kernel image | is available")

    monkeypatch.setattr(steps, "diffusers_step", fail)
    monkeypatch.setitem(benchmark.CHILDREN, "start", lambda options: {"failed": "not here"})
    found = measured(benchmark, tmp_path, "--only", "speed", "--precision", "fp32")
    assert set(found["steps"][0]["result"]["seconds"]) == {"ours"}
    page = (tmp_path / "report" / "gpu.md").read_text()
    assert "| no diffusers: RuntimeError: CUDA error: no kernel image / is available |" in page


def test_a_compiler_that_is_missing_leaves_the_other_variants(
    steps: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Triton needs compute capability 7.0")

    monkeypatch.setattr(torch, "compile", fail)
    variants = {"ours": None}
    assert steps.add_compiled(variants, None, None) == {
        "without": "diffusers is not compiled: RuntimeError: Triton needs compute capability 7.0"
    }
    assert set(variants) == {"ours"}


def test_names_and_shapes_without_diffusers_are_diffusers_own() -> None:
    from zimage_export.synthetic import checkpoint as synthetic

    config = synthetic.SMALL.config
    for component, published in (
        ("transformer", synthetic._transformer_shapes(config)),
        ("vae", synthetic._vae_shapes(config)),
        ("text_encoder", synthetic._text_encoder_shapes(config)),
    ):
        ours = synthetic.program_shapes(config, component)
        theirs = {name.removeprefix("model."): shape for name, shape in published.items()}
        assert {name: theirs.get(name) for name in ours} == ours
        last = f"layers.{config.text_encoder.num_hidden_layers - 1}."
        unused = {name for name in set(theirs) - set(ours) if not name.startswith((last, "norm."))}
        assert unused == set(), component


def test_the_work_of_a_step_is_as_published() -> None:
    """453 TFLOP for 8 steps at 1024x1024 with a caption of 128 tokens."""
    from zimage_export.synthetic.checkpoint import FULL
    from zimage_runtime.model.geometry import image_geometry
    from zimage_runtime.model.operations import step_operations

    operations = step_operations(FULL.config, image_geometry(1024, 1024, FULL.config), 128)
    assert 8 * operations.total / 1e12 == pytest.approx(453, rel=0.02)


def test_a_measurement_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_rt.bench import children

    found = subprocess.run  # not the real child: one that takes longer than it may

    def run(words: list[str], **options: Any) -> Any:
        return found(["sleep", "60"], **options)

    monkeypatch.setattr(children.subprocess, "run", run)
    asked = {"precision": "bf16", "limit": 0.2}
    assert children.run_child("gpu.py", "steps", asked) == {"failed": "not done in 0.2 s"}
