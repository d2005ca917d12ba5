"""The GPU benchmark runs from end to end where there is no GPU, on a small model, and reports all that it should."""

import argparse
import importlib
import json
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest


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


def test_without_diffusers_it_says_so(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("diffusers", "transformers") else find_spec(name, package)

    monkeypatch.setattr(benchmark, "find_spec", found)
    monkeypatch.setattr("zimage_export.synthetic.find_spec", found)
    benchmark.main(arguments(tmp_path))
    assert "diffusers is not installed" in capsys.readouterr().out
    document = json.loads((tmp_path / "report" / "gpu_cuda.json").read_text())
    assert set(document["one_step"][0]["seconds"]) == {"ours"}


def test_names_and_shapes_without_diffusers_are_diffusers_own() -> None:
    from zimage_export import synthetic

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
    from zimage_export.synthetic import FULL
    from zimage_runtime.geometry import picture_geometry

    flops = benchmark.step_flops(FULL.config, picture_geometry(1024, 1024, FULL.config), 128)
    assert 8 * flops / 1e12 == pytest.approx(453, rel=0.02)


def test_a_failure_of_one_measurement_is_in_the_report(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "in_child", lambda kind, options: {"failed": f"{kind}: out | of memory"})
    monkeypatch.setattr(benchmark, "prepared", lambda work, scale, precision: work / "none")
    names = argparse.Namespace(
        executor="cpu", scale="small", steps=2, repeat=1, vram=None, without_diffusers=True, work=tmp_path
    )
    names.precision, names.size, names.out = ["fp32"], [(64, 64)], tmp_path
    page = benchmark.report(benchmark.run(names))
    for kind in ("parity", "placement", "pictures", "steps"):
        assert f"{kind}: out / of memory" in page
