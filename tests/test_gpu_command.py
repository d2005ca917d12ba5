"""`make bench-gpu` without a GPU: a trial of everything, TensorRT on the stand-in, and reports of what failed."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from device_stand_in import StandInDevice
from facts import assert_facts
from gpu_stand_in import remove_driver
from onnx_engines import OnnxEngines, twin_spec, twins

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.executors.tensorrt.denoiser import StageDenoiser
from zimage_runtime.executors.tensorrt.executor import TensorRtExecutor
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def inside(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In this process: what a process of its own brings is a memory of its own, and seconds."""
    monkeypatch.setattr(gpu, "in_child", lambda kind, options, **environment: gpu.CHILDREN[kind](options))
    return gpu


@pytest.fixture(autouse=True)
def restored_options() -> Iterator[None]:
    from zimage_runtime.executors.ort.cuda import CudaProvider

    before = CudaProvider.options
    yield
    CudaProvider.options = before  # type: ignore[method-assign]


def trial(tmp_path: Path, *more: str) -> list[str]:
    words = ["--work", str(tmp_path), "--trial", "--scale", "small", "--precision", "fp32", "--size", "64x64"]
    words += ["--steps", "1", "--repeat", "1", "--images", "3", "--out", str(tmp_path / "report")]
    return [*words, "--vram", *more]


def written(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "report" / "gpu.json").read_text())
    return found


@pytest.mark.usefixtures("diffusers_pipeline")  # for its one thread
def test_a_trial_of_what_is_measured(
    inside: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(inside.CHILDREN, "copies", lambda options: {"failed": "no | GPU"})
    inside.main(trial(tmp_path, "--only", "memory", "speed", "parts"))
    page, document = capsys.readouterr().out, written(tmp_path)
    kinds = [row["kind"] for row in document["rows"]]
    assert set(kinds) == {*inside.CHILDREN} - {"tensorrt", "placement", "parity", "cycle"}
    results = {row["kind"]: row["result"] for row in document["rows"]}
    assert results["attention"]["difference"] < 1e-4
    assert set(results["attention"]["rows"].popitem()[1]) == {"Attention", "MultiHeadAttention"}
    assert {len(ways) for ways in results["layouts"]["rows"].values()} == {2, 3}
    assert [row["name"] for row in document["rows"] if row["kind"] == "start"][1] == "fp32, second start"
    for words in ("its times and its memory mean nothing", "cuda fp32, 64x64", "| no / GPU |"):
        assert words in page


def test_a_measurement_is_a_process_with_its_own_cache(gpu: ModuleType, tmp_path: Path) -> None:
    options = {"executor": "cpu", "repeat": 1, "limit": 60, "precision": "fp32", "size": [64, 64]}
    assert gpu.in_child("attention", options)["difference"] < 1e-4
    assert_facts(gpu.in_child("nothing", options, XDG_CACHE_HOME=str(tmp_path))["failed"], "KeyError", "nothing")


def test_sections_are_chosen_and_kept_as_they_come(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, int | None]] = []

    def child(kind: str, options: dict[str, Any], **environment: str) -> dict[str, str]:
        assert options["limit"] == 7
        if kind == "start":
            assert Path(environment["XDG_CACHE_HOME"]).is_dir()
        asked.append((kind, options["executor"], options["vram"]))
        assert len(written(tmp_path)["rows"] if len(asked) > 1 else []) == len(asked) - 1
        return {"failed": "told to"}

    monkeypatch.setattr(gpu, "in_child", child)
    monkeypatch.setattr(gpu, "prepared", lambda work, scale, precision, engines=False: work / f"{scale}-{precision}")
    here = {"cuda": None, "tensorrt": None, "webgpu": "no Vulkan driver found"}
    monkeypatch.setattr(gpu, "executors_here", lambda given, precision: here)
    words = ["--work", str(tmp_path), "--out", str(tmp_path / "report"), "--limit", "7", "--precision", "bf16", "int8"]
    gpu.main([*words, "--only", "memory", "tensorrt"])
    budgets = [6 << 30, 8 << 30, 12 << 30]
    one_way = [("pictures", "cuda", None)] * 3 + [("pictures", "cuda", budget) for budget in budgets]
    engines = [("pictures", "tensorrt", None)] * 3 + [("pictures", "tensorrt", budget) for budget in budgets]
    settings = [("tensorrt", "tensorrt", None)] * (3 + 1 + 2 + 2)
    assert asked == one_way * 4 + engines * 2 + settings, "int8 has three denoisers on CUDA"
    page = (tmp_path / "report" / "gpu.md").read_text()
    assert_facts(page.replace("\n", " "), "webgpu", "no Vulkan driver found", "told to")
    asked.clear()
    (tmp_path / "report" / "gpu.json").unlink()
    gpu.main([*words, "--only", "speed", "correctness"])
    assert [kind for kind, *_ in asked][:3] == ["placement", "parity", "placement"], "correctness comes first"
    assert [kind for kind, *_ in asked].count("cycle") == 2
    assert [kind for kind, *_ in asked][-2:] == ["start", "start"]


def test_what_is_not_here_is_said_and_not_built(
    gpu: ModuleType, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[bool] = []

    def prepared(work: Path, scale: str, precision: str, *, engines: bool = False) -> Path:
        built.append(engines)
        return bundle

    remove_driver(monkeypatch)
    monkeypatch.setattr(gpu, "prepared", prepared)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    gpu.main(["--work", str(tmp_path), "--out", str(tmp_path / "report")])
    assert built == [False, False], "no engines are built without TensorRT"
    document = written(tmp_path)
    assert set(document["executors"]) == {"cuda", "tensorrt", "webgpu"}
    assert document["rows"] == []
    page = capsys.readouterr().out
    assert_facts(page.replace("\n", " "), "no NVIDIA driver", "tensorrt_rtx", "no Vulkan driver")


@pytest.fixture
def stand_in(gpu: ModuleType, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """TensorRT's executor on the stand-in device, for measurements of this process; and their options."""
    opened = Bundle.open(bundle)
    programs = twins(opened)
    spec = twin_spec(opened, programs)

    def open_any(options: dict[str, Any]) -> Pipeline:
        vram = options["vram"] or 1 << 30
        device = StandInDevice(limit=vram, track=False)
        return Pipeline.on(opened, TensorRtExecutor(opened, device, OnnxEngines(device, programs, spec), spec, vram))

    monkeypatch.setattr(importlib.import_module("gpu_images"), "open_any", open_any)
    monkeypatch.setattr(StageDenoiser, "_replay", StageDenoiser._replay)  # so that it is restored
    common = {"executor": "tensorrt", "bundle": str(bundle), "vram": None, "size": [64, 64], "steps": 3, "repeat": 1}
    return {**common, "denoiser": None, "strategy": "EAGER", "capture": True}


def test_tensorrt_is_measured_as_the_others_are(gpu: ModuleType, stand_in: dict[str, Any]) -> None:
    images = gpu.child_pictures(stand_in)
    assert images["planned_bytes"] > 0
    assert images["keep_all"] is True
    cycle = gpu.child_cycle({**stand_in, "sizes": [[64, 64], [64, 96]], "images": 5})
    assert cycle["equal"] is True
    assert gpu.child_parity(stand_in)["latents_error"] < 1e-5


def test_tensorrts_settings_are_changed(
    gpu: ModuleType, stand_in: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_rtx

    settings = importlib.import_module("gpu_trt_settings")
    strategies, name = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy, "update_device_memory_size_for_shapes"
    monkeypatch.setattr(tensorrt_rtx, "DynamicShapesKernelSpecializationStrategy", strategies)
    monkeypatch.setattr(tensorrt_rtx.IExecutionContext, name, lambda context: 17)
    captured: list[Any] = []
    begin = StandInDevice.begin_capture
    monkeypatch.setattr(
        StandInDevice, "begin_capture", lambda self, stream: (captured.append(stream), begin(self, stream))[1]
    )
    gpu.child_tensorrt(stand_in)
    assert captured
    captured.clear()
    gpu.child_tensorrt({**stand_in, "capture": False, "strategy": "LAZY"})
    assert captured == []
    assert tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER == strategies.LAZY
    asked = settings.watch_scratch()
    assert tensorrt_rtx.IExecutionContext.update_device_memory_size_for_shapes(None) == 17
    assert asked == [17]


def test_settings_of_the_provider_are_changed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_runtime.executors.ort.cuda import CudaProvider
    from zimage_runtime.executors.ort.device import OrtDevice

    parts = importlib.import_module("gpu_parts")
    provider = CudaProvider(OrtDevice(), 8 << 30, exact=True)
    monkeypatch.setattr(parts, "child_pictures", lambda options: provider.options())
    ours = provider.options()
    changed = gpu.PROVIDER["maps [N, H, W, C]"]
    assert gpu.child_provider({"changed": changed}) == {**ours, **changed} != ours


def test_growth_and_other_latents_are_seen(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the measurement is for, with an executor that leaks and drifts."""
    images = importlib.import_module("gpu_images")
    held = iter([100, 110, 200, 210, 300, 310])

    class Watch:
        process = 0

        def __enter__(self) -> "Watch":
            return self

        def __exit__(self, *exception: object) -> None:
            self.process = next(held)

    class Pipe:
        def __enter__(self) -> "Pipe":
            return self

        def __exit__(self, *exception: object) -> None: ...

        def forget_prompt(self) -> None: ...

    drawn = iter(np.arange(6))
    monkeypatch.setattr(images, "VramWatch", Watch)
    monkeypatch.setattr(images, "open_any", lambda options: Pipe())
    monkeypatch.setattr(
        images, "last_event", lambda pipeline, size, steps: type("E", (), {"latents": np.full(2, next(drawn))})()
    )
    found = gpu.child_cycle({"sizes": [[1, 1], [2, 2]], "images": 6, "steps": 1})
    assert found == {"images": 6, "equal": False, "growth_bytes": 100, "round_bytes": [110, 210, 310]}
