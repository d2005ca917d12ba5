"""The GPU benchmark runs from end to end where there is no GPU, on a small model, and reports all that it should."""

import argparse
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
    module = importlib.import_module("gpu_cuda")
    # in this process: what a process of its own brings is a memory of its own, and seconds
    monkeypatch.setattr(module, "in_child", lambda kind, options: module._CHILDREN[kind](options))
    return module


def arguments(tmp_path: Path, *more: str) -> list[str]:
    words = ["--work", str(tmp_path), "--executor", "cpu", "--scale", "small", "--precision", "fp32", "--steps", "2"]
    return [*words, "--size", "64x64", "--repeat", "2", "--out", str(tmp_path / "report"), *more]


@pytest.mark.usefixtures("diffusers_pipeline")  # for its one thread
def test_a_trial_without_a_gpu(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(arguments(tmp_path))
    page = capsys.readouterr().out
    document = json.loads((tmp_path / "report" / "gpu_cuda.json").read_text())
    assert (tmp_path / "report" / "gpu_cuda.md").read_text().strip() == page.strip()
    (step,), (picture,) = document["one_step"], document["pictures"]
    assert "failed" not in step | picture
    assert set(step["seconds"]) == {"ours", "diffusers eager"}
    assert step["over_floor"]["ours"] == pytest.approx(step["seconds"]["ours"] / step["floor_seconds"])
    assert document["parity"]["fp32"]["latents_error"] < 1e-5
    assert {"text_encoder", "caption", "denoiser", "decoder", "encoder"} == set(document["placement"]["fp32"])
    for words in ("fp32 64x64 ours", "fp32 64x64 diffusers eager", "fp32 denoiser", "times mean nothing"):
        assert words in page


def test_the_attention_backend_of_the_process_is_restored(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()
    # the one that is never the default and that a CPU has: measured alone, it is the fastest
    monkeypatch.setattr("gpu_tools.DIFFUSERS_BACKENDS", ("_native_flash",))
    benchmark.main(arguments(tmp_path, "--only", "steps"))
    (step,) = json.loads((tmp_path / "report" / "gpu_cuda.json").read_text())["one_step"]
    assert step["backend"] == "_native_flash"
    assert registry.get_active_backend() == before


def test_without_diffusers_it_says_so(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("diffusers", "transformers") else find_spec(name, package)

    monkeypatch.setattr(benchmark, "find_spec", found)
    monkeypatch.setattr("zimage_export.synthetic.checkpoint.find_spec", found)
    benchmark.main(arguments(tmp_path, "--only", "steps"))
    assert "diffusers is not installed" in capsys.readouterr().out
    document = json.loads((tmp_path / "report" / "gpu_cuda.json").read_text())
    assert set(document["one_step"][0]["seconds"]) == {"ours"}


def test_int8_is_measured_with_both_of_its_denoisers(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.main(arguments(tmp_path, "--precision", "int8", "--without-diffusers"))
    document = json.loads((tmp_path / "report" / "gpu_cuda.json").read_text())
    rows = [*document["pictures"], *document["one_step"]]
    assert [row["precision"] for row in rows] == ["int8", "int8 weight-only"] * 2
    assert not [row for row in rows if "failed" in row]
    planned = [row["planned_bytes"] for row in document["pictures"]]
    assert planned[1] < planned[0]
    errors = {name: found["latents_error"] for name, found in document["parity"].items()}
    assert 1e-4 < errors["int8 weight-only"] < 0.1
    assert 1e-4 < errors["int8"] < 0.1
    assert errors["int8"] != errors["int8 weight-only"]
    assert set(document["placement"]) == set(errors)
    page = (tmp_path / "report" / "gpu_cuda.md").read_text()
    assert "int8 weight-only denoiser" in page


def test_what_is_measured_by_default(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(benchmark, "run", lambda options: asked.append(options))
    monkeypatch.setattr(benchmark, "report", lambda document: "page")
    benchmark.main(["--work", str(tmp_path)])
    assert asked[0].precision == ["bf16", "fp16", "int8"]
    assert asked[0].size == [(512, 512), (1024, 1024), (1536, 1536)]
    assert (asked[0].executor, asked[0].scale) == ("cuda", "full")
    assert capsys.readouterr().out == "page\n"


def test_what_diffusers_lacks_costs_its_columns_alone(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA error: no kernel image | is available")

    monkeypatch.setattr(benchmark, "diffusers_step", fail)
    benchmark.main(arguments(tmp_path, "--only", "steps"))
    document = json.loads((tmp_path / "report" / "gpu_cuda.json").read_text())
    (step,) = document["one_step"]
    assert "failed" not in step
    assert set(step["seconds"]) == {"ours"}
    page = (tmp_path / "report" / "gpu_cuda.md").read_text()
    assert "| fp32 64x64 | no diffusers: RuntimeError: CUDA error: no kernel image / is available |" in page


def test_a_compiler_that_is_missing_leaves_the_other_variants(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Triton needs compute capability 7.0")

    monkeypatch.setattr(torch, "compile", fail)
    variants = {"ours": None}
    assert benchmark.add_compiled(variants, None, None) == {
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


def test_the_work_of_a_step_is_as_published(benchmark: ModuleType) -> None:
    """453 TFLOP for 8 steps at 1024x1024 with a caption of 128 tokens."""
    from zimage_export.synthetic.checkpoint import FULL
    from zimage_runtime.model.geometry import image_geometry

    flops = benchmark.step_flops(FULL.config, image_geometry(1024, 1024, FULL.config), 128)
    assert 8 * flops / 1e12 == pytest.approx(453, rel=0.02)


def test_what_is_measured_can_be_chosen_and_is_kept_as_it_comes(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def child(kind: str, options: dict[str, Any]) -> dict[str, str]:
        kept.append(len(list((tmp_path / "report").glob("part.*"))))
        assert options["limit"] == 7
        return {"failed": f"{kind} of {options['precision']}"}

    monkeypatch.setattr(benchmark, "in_child", child)
    monkeypatch.setattr(benchmark, "prepared", lambda work, scale, precision: work / "none")
    chosen = ["--only", "parity", "pictures", "--limit", "7", "--name", "part", "--without-diffusers"]
    benchmark.main(arguments(tmp_path, *chosen))
    assert kept == [0, 2], "the report is written after each"
    document = json.loads((tmp_path / "report" / "part.json").read_text())
    assert document["parity"] == {"fp32": {"failed": "parity of fp32"}}
    assert document["placement"] == {}
    assert document["one_step"] == []
    assert document["pictures"][0]["failed"] == "pictures of fp32"


def test_a_measurement_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    module = importlib.import_module("gpu_cuda")
    tools = importlib.import_module("gpu_tools")
    found = subprocess.run  # not the real child: one that takes longer than it may

    def run(words: list[str], **options: Any) -> Any:
        return found(["sleep", "60"], **options)

    monkeypatch.setattr(tools.subprocess, "run", run)
    assert module.in_child("steps", {"precision": "bf16", "limit": 0.2}) == {"failed": "not done in 0.2 s"}


def test_a_failure_of_one_measurement_is_in_the_report(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "in_child", lambda kind, options: {"failed": f"{kind}: out | of memory"})
    monkeypatch.setattr(benchmark, "prepared", lambda work, scale, precision: work / "none")
    asked: list[argparse.Namespace] = []
    with monkeypatch.context() as caught:
        caught.setattr(benchmark, "run", asked.append)
        caught.setattr(benchmark, "report", str)
        benchmark.main(arguments(tmp_path, "--without-diffusers"))
    page = benchmark.report(benchmark.run(asked[0]))
    for kind in ("parity", "placement", "pictures", "steps"):
        assert f"{kind}: out / of memory" in page
