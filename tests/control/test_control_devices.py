"""Control on the executors for GPUs: with the CPU in the GPU's place, and on a software adapter; and in plans."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_rt
from control_tools import LITE, TWO, TWO_ONE, Controlled, Version, ours, photograph
from facts import raises_with
from parity import Guided, relative_error
from webgpu_adapter import require_adapter

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.controlnet import ControlNet
from zimage_runtime.bundle.manifest import CUDA, Precision
from zimage_runtime.errors import MemoryLimitError, RequestError
from zimage_runtime.executors import choose
from zimage_runtime.executors.choose import ExecutorChoice
from zimage_runtime.executors.ort.cpu import OrtCpuExecutor
from zimage_runtime.executors.ort.cpu_plan import plan_memory
from zimage_runtime.executors.ort.cuda import cuda_executor
from zimage_runtime.executors.ort.cuda_plan import CudaCosts, plan_vram
from zimage_runtime.executors.ort.device import OrtDevice
from zimage_runtime.executors.ort.device_executor import OrtDeviceExecutor
from zimage_runtime.executors.ort.device_plan import VramPlan, best_plan
from zimage_runtime.executors.protocol import UNLIMITED, Work
from zimage_runtime.model.geometry import image_geometry, padded
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline, Request

Nets = Callable[..., Path]
Bundles = Callable[[Precision], Path]
SIZE = (64, 48)
CASE = Controlled(SIZE, 0.8, 2)
HINTS_IN_16_BITS = 5e-3
"""bfloat16 has 8 bits of fraction: hints, and so images, are that far off in a bundle that is otherwise float32."""


def in_place_of_cuda(root: Path, budget: int = 1 << 40) -> Pipeline:
    opened = Bundle.open(root)
    return Pipeline.on(opened, cuda_executor(opened, budget=budget, device=OrtDevice("cpu")))


@pytest.mark.deep
@pytest.mark.parametrize("version", [TWO, TWO_ONE], ids=lambda version: version.name)
def test_cudas_programs_with_the_cpu_in_the_gpus_place(version: Version, extended_in: Bundles, net_of: Nets) -> None:
    root, net = extended_in(Precision.FP32), net_of(version)
    guided = Controlled((80, 48), 1.0, 2, window=(0.0, 0.5), guided=Guided())
    with in_place_of_cuda(root) as pipeline, Pipeline.from_bundle(root, "cpu") as reference:
        plain = ours(pipeline, None, CASE)
        for case in (CASE, guided):
            error = relative_error(ours(pipeline, net, case).latents, ours(reference, net, case).latents)
            assert 1e-5 < error < HINTS_IN_16_BITS
        assert np.array_equal(ours(pipeline, None, CASE).latents, plain.latents)
        pipeline.release()
        assert relative_error(ours(pipeline, None, CASE, control_scale=0.75).latents, plain.latents) == 0


@pytest.mark.deep
def test_bundle_and_controlnet_in_unlike_precisions(extended_in: Bundles, net_of: Nets) -> None:
    """On CUDA's programs and the CPU's own: near each other, and far from the image without control."""
    root, net = extended_in(Precision.INT8), net_of(LITE, Precision.FP16)
    with in_place_of_cuda(root) as pipeline, Pipeline.from_bundle(root, "cpu") as reference:
        found, expected, plain = ours(pipeline, net, CASE), ours(reference, net, CASE), ours(reference, None, CASE)
    assert relative_error(plain.latents, expected.latents) > 0.3
    assert relative_error(found.latents, expected.latents) < 0.06


@pytest.mark.slow  # a software adapter takes a minute for both
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_webgpus_programs_on_an_adapter(precision: Precision, extended_in: Bundles, net_of: Nets) -> None:
    require_adapter()
    from zimage_runtime.executors.ort.webgpu import webgpu_executor
    from zimage_runtime.executors.ort.webgpu_adapters import find_adapter

    root, net = extended_in(precision), net_of(TWO_ONE, precision)
    opened = Bundle.open(root)
    with (
        Pipeline.on(opened, webgpu_executor(opened, find_adapter(), budget=UNLIMITED)) as pipeline,
        Pipeline.from_bundle(root, "cpu") as reference,
    ):
        error = relative_error(ours(pipeline, net, CASE).latents, ours(reference, net, CASE).latents)
        assert error < (1e-4 if precision is Precision.FP32 else 0.05)  # the CPU's int8 rounds activations, too
        asked = {"size": SIZE, "control": photograph(*SIZE), "controlnet": net_of(LITE, Precision.BF16)}
        with raises_with(RequestError, asked["controlnet"], "bf16", "fp16"):
            pipeline.stream("a fox", **asked)


@pytest.mark.deep
def test_the_programs_of_a_step_stay_beside_each_other(
    extended_in: Bundles, net_of: Nets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where stages take turns, each is loaded once for an image, however many steps there are."""
    root, loads = extended_in(Precision.FP32), []
    asked = {"control": photograph(*SIZE), "controlnet": net_of(LITE), "size": SIZE, "steps": 3, "seed": 1}
    with in_place_of_cuda(root) as roomy:
        plan = roomy.prepare(Request("a fox", **asked)).plan
    assert isinstance(plan, VramPlan)
    turns = replace(plan, keep_all=False)
    assert turns.peak < plan.peak
    load = OrtDeviceExecutor._session
    monkeypatch.setattr(OrtDeviceExecutor, "_session", lambda self, p, stop: (loads.append(p), load(self, p, stop))[1])
    with in_place_of_cuda(root, turns.peak) as pipeline:
        job = pipeline.prepare(Request("a fox", **asked))
        assert isinstance(job.plan, VramPlan)
        assert not job.plan.keep_all
        list(pipeline.run(job))
    assert len(loads) == len(set(loads)), loads
    assert {Program.TOKENS, Program.REFINERS, Program.CONTROL_LAYERS, Program.DENOISER} < set(loads)


def work(root: Path, net: Path | None, **more: Any) -> tuple[Bundle, Work]:
    bundle = Bundle.open(root)
    geometry = image_geometry(*SIZE, bundle.manifest.config)
    control = None if net is None else ControlNet.open(net)
    given: dict[str, Any] = {"geometry": geometry, "tokens": 40, "encodes": True, "control": control}
    return bundle, Work(**(given | more))


def test_hints_and_weights_are_counted(extended_in: Bundles, net_of: Nets) -> None:
    """In 16 bits on CUDA, where values of no session's take up to twice their size; in float32 on the CPU."""
    bundle, controlled = work(extended_in(Precision.FP32), net_of(LITE), batch=2)
    plain = replace(controlled, control=None)
    config = ControlNet.open(net_of(LITE)).manifest.config
    tokens = 2 * (controlled.geometry.image_tokens + padded(40))
    hints = len(config.places) * tokens * config.dim
    on_cpu = plan_memory(bundle.manifest, controlled)
    on_gpu = plan_vram(bundle.manifest, controlled, UNLIMITED)
    kept = on_cpu.document()["hints"] - 4 * hints
    assert kept > 0
    assert on_gpu.document()["hints"] == 2 * (2 * hints + kept)
    weights = {
        program: on_gpu.stages[program].weights - 0
        for program in (Program.TOKENS, Program.REFINERS, Program.CONTROL_REFINER, Program.CONTROL_LAYERS)
    }
    file = (net_of(LITE) / "weights.safetensors").stat().st_size
    of_control = sum(size for program, size in weights.items() if program.component == "controlnet")
    assert 0.6 * file < of_control < 1.1 * file
    assert weights[Program.REFINERS] > weights[Program.TOKENS] > 0
    for with_control, without in (
        (on_gpu.peak, plan_vram(bundle.manifest, plain, UNLIMITED).peak),
        (on_cpu.peak, plan_memory(bundle.manifest, plain).peak),
    ):
        assert with_control > without + of_control * 0.9


def test_what_does_not_fit_is_refused_with_what_would(extended_in: Bundles, net_of: Nets) -> None:
    bundle, controlled = work(extended_in(Precision.FP32), net_of(LITE))
    least = replace(best_plan(CudaCosts((CUDA,)), bundle.manifest, controlled, UNLIMITED), keep_all=False).peak
    assert not plan_vram(bundle.manifest, controlled, least).keep_all
    with pytest.raises(MemoryLimitError):
        plan_vram(bundle.manifest, controlled, least - 1)


@pytest.mark.deep
def test_plan_shows_a_controlnet(root: Path, bundle: Path, net_of: Nets, capsys: Capture) -> None:
    words = ("plan", root, "--size", "64x48", "--controlnet", net_of(LITE))
    for executor in ("cpu", "cuda", "webgpu"):
        document = json.loads(call_rt(capsys, *words, "--executor", executor, "--json").out)
        assert {"refiners", "control_refiner", "control_layers", "encoder"} < set(document["stages"])
        assert "control_layers" in call_rt(capsys, *words, "--executor", executor).out
    assert json.loads(call_rt(capsys, *words, "--json").out)["executor"] == "cuda"
    assert_one_line_error(
        call_rt(capsys, *words, "--executor", "tensorrt"), "tensorrt", "ControlNet", "--executor cuda"
    )
    refused = call_rt(capsys, "plan", bundle, "--controlnet", net_of(LITE))
    assert_one_line_error(refused, f"programs {bundle} --control")


@dataclass
class NoControl(OrtCpuExecutor):
    """An executor that runs no steps under control, as TensorRT's."""

    name = "tensorrt"
    takes_control = False


def test_auto_goes_on_from_what_takes_no_control(root: Path, net_of: Nets, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(root)
    _, controlled = work(root, net_of(LITE))
    choice = ExecutorChoice(opened, current=NoControl(opened))
    monkeypatch.setattr(choose, "EXECUTORS", {"tensorrt": "", "cpu": choose.EXECUTORS["cpu"]})
    chosen = choice.plan(replace(controlled, control=None))
    assert chosen.executor.name == "tensorrt"
    chosen = choice.plan(controlled)
    assert chosen.executor.name == "cpu"
    assert chosen.unexpected
    assert chosen.why is not None
    assert "control" in chosen.why
    choice.close()
    named = ExecutorChoice.of(opened, NoControl(opened))
    with raises_with(RequestError, "tensorrt", "control", "--executor cuda"):
        named.plan(controlled)
    named.close()
