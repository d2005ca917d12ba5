"""Which program an int8 bundle's denoiser runs on a GPU, and which bundle of a model is for which GPU and budget."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_tools import Capture, assert_one_line_error, call_rt
from facts import assert_facts, has_fact, memory_amounts, raises_with
from parity import relative_error

from zimage_export.graphs import PROGRAM_SETS, build_programs
from zimage_export.storage.precision import StoragePolicy
from zimage_export.synthetic.checkpoint import FULL
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import (
    CPU,
    CUDA,
    CUDA_BLOCKS,
    CUDA_WEIGHT_ONLY,
    WEBGPU,
    Defaults,
    Manifest,
    Origin,
    Precision,
    ProgramRecord,
)
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.errors import ExecutorError, MemoryLimitError
from zimage_runtime.executors.ort.cuda import cuda_executor
from zimage_runtime.executors.ort.cuda_plan import other_peaks, plan_vram
from zimage_runtime.executors.ort.device import OrtDevice
from zimage_runtime.executors.ort.device_plan import VramPlan
from zimage_runtime.executors.ort.int8_denoiser import CHOICES, INT8_PRODUCTS, denoiser_programs, why_no_int8
from zimage_runtime.executors.ort.other_precisions import advised, as_precision, candidates
from zimage_runtime.executors.protocol import Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program
from zimage_runtime.pipeline import ImageEvent, Job, NoticeEvent, Pipeline, Request

GIB = 1 << 30
ADA, HOPPER, TURING, PASCAL = (8, 9), (9, 0), (7, 5), (6, 1)


@functools.cache
def published(precision: Precision) -> Manifest:
    """A manifest of the published model, sized by the graphs themselves."""
    policy = StoragePolicy(precision, DType.BF16)
    programs: dict[Program, dict[str, ProgramRecord]] = {program: {} for program in MODEL_PROGRAMS}
    for graph in build_programs(FULL.config, policy, {}):
        if PROGRAM_SETS[graph.executor].executor != CUDA:
            continue
        size = sum(graph.types[name].size * math.prod(shape) for name, shape in graph.weights.items())
        programs[graph.program][graph.executor] = ProgramRecord("x", size)
    return Manifest(
        precision=precision,
        source=Origin("full"),
        exporter="test",
        config=FULL.config,
        defaults=Defaults(1024, 1024, 8),
        programs=programs,
        weights={},
        embeddings="",
        tokenizer="",
        files={},
    )


def plan(precision: Precision, budget: float, capability: tuple[int, int] | None = None, side: int = 1024) -> VramPlan:
    return plan_vram(published(precision), work(side), int(budget * GIB), capability=capability)


def work(side: int) -> Work:
    return Work(geometry=image_geometry(side, side, FULL.config), tokens=128)


@pytest.mark.parametrize("source", [Precision.FP32, Precision.BF16, Precision.INT8, Precision.INT4])
@pytest.mark.parametrize("target", [Precision.FP32, Precision.BF16, Precision.INT8, Precision.INT4])
def test_what_another_bundle_would_hold_is_what_it_does_hold(source: Precision, target: Precision) -> None:
    found = as_precision(published(source), target).programs
    for program, records in published(target).programs.items():
        if program is Program.MODULATION:
            continue
        assert records.keys() == found[program].keys()
        held, predicted = records[CUDA].weight_bytes, found[program][CUDA].weight_bytes
        if Precision.INT4 in (source, target):  # of which a tenth keeps 8 bits, and here nothing does
            assert predicted == pytest.approx(held, rel=0.09)
        elif program.component == "vae":  # norms are float32 in all
            assert predicted == pytest.approx(held, rel=0.01)
        else:
            assert predicted == held


def test_products_of_bytes_are_for_gpus_that_are_fast_at_them() -> None:
    for capability in (None, ADA, PASCAL, (8, 6), (12, 0), (12, 1)):
        roomy = plan(Precision.INT8, 24, capability)
        assert (roomy.denoiser, roomy.notes) == (CUDA, ()), capability
    for capability in (HOPPER, TURING, (7, 0), (8, 0), (10, 0), (10, 3)):
        roomy = plan(Precision.INT8, 24, capability)
        assert roomy.denoiser == CUDA_WEIGHT_ONLY, capability
        (note,) = roomy.notes
        assert_facts(note, "fp16", "int8", "{}.{}".format(*capability))
    assert plan(Precision.BF16, 24, HOPPER).denoiser == CUDA


def test_the_table_covers_the_gpus_that_the_package_has_code_for() -> None:
    """onnxruntime-gpu 1.31.1's provider; each choice has its source, and both programs are somewhere the first."""
    assert {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)} <= CHOICES.keys()
    assert {choice.first for choice in CHOICES.values()} == {CUDA, CUDA_WEIGHT_ONLY}
    for capability in (None, ADA, HOPPER):  # blocks are not measured: they can be chosen, and are nowhere the first
        assert denoiser_programs(published(Precision.INT8), capability)[-1] == CUDA_BLOCKS
    assert all(choice.source and choice.gpus for choice in CHOICES.values())
    assert all(capability >= INT8_PRODUCTS for capability in CHOICES)


def test_a_budget_that_products_of_bytes_do_not_fit_in_is_for_the_other_program() -> None:
    """8 GiB are enough for 1344x1344 with fp16 activations alone."""
    tight = plan(Precision.INT8, 8, ADA, side=1344)
    assert tight.denoiser == CUDA_WEIGHT_ONLY
    assert tight.peak <= 8 * GIB
    assert_facts(tight.notes[0], "fp16", "int8")
    assert "8.9" not in tight.notes[0], "it is not the GPU's speed"
    assert plan(Precision.INT8, 8, ADA).denoiser == CUDA
    with pytest.raises(MemoryLimitError):
        plan_vram(published(Precision.INT8), work(1344), 8 * GIB, capability=ADA, denoiser=CUDA)


def test_a_refusal_names_the_bundle_that_would_fit() -> None:
    with raises_with(MemoryLimitError, "9.0 GiB", "int8", "--vram") as refusal:
        plan(Precision.BF16, 9)
    own, free, others = memory_amounts(str(refusal.value))
    assert others < free < own
    assert plan(Precision.INT8, others).peak <= 9 * GIB
    with raises_with(MemoryLimitError, "6.0 GiB", "int4", "--vram"):
        plan(Precision.INT8, 6)
    with raises_with(MemoryLimitError, "2.0 GiB", "--vram") as refusal:
        plan(Precision.INT8, 2)
    assert not any(has_fact(str(refusal.value), precision) for precision in Precision), "none fits"


def test_the_nearest_to_the_original_that_fits_is_advised() -> None:
    def best(budget: float, capability: tuple[int, int] | None) -> Precision | None:
        manifest, size = published(Precision.INT4), int(budget * GIB)
        peaks = other_peaks(manifest, work(1024), size, capability=capability)
        own = plan_vram(manifest, work(1024), 1 << 60, capability=capability).peak
        return advised({**peaks, Precision.INT4: own}, size, capability)

    assert [best(size, ADA) for size in (24, 16, 9)] == [Precision.BF16, Precision.BF16, Precision.INT8]
    assert best(16, TURING) is Precision.FP16
    assert best(1, ADA) is None
    assert candidates((6, 0)) == (Precision.FP16, Precision.INT4)
    assert [why_no_int8(Precision.INT8, c) is None for c in (PASCAL, (6, 0), (5, 2))] == [True, False, False]
    assert why_no_int8(Precision.FP16, (5, 2)) is None


@pytest.fixture(scope="module")
def int8(bundle_in: Callable[[Precision], Path]) -> Bundle:
    return Bundle.open(bundle_in(Precision.INT8))


def test_the_executor_runs_the_program_of_the_plan(int8: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU provider: an image with each program, the same image but for how activations are rounded."""
    opened: list[str] = []
    find = Bundle.program

    def noted(bundle: Bundle, program: Program, executor: str) -> Path:
        opened.append(f"{program}.{executor}")
        return find(bundle, program, executor)

    monkeypatch.setattr(Bundle, "program", noted)
    latents = []
    for capability, wanted in ((ADA, CUDA), (HOPPER, CUDA_WEIGHT_ONLY)):
        opened.clear()
        executor = cuda_executor(int8, budget=1 << 40, device=OrtDevice("cpu"), capability=capability)
        events = list(Pipeline.on(int8, executor).stream("a red fox", size=(64, 64), steps=2, seed=7))
        assert [name for name in opened if name.startswith("denoiser")] == [f"denoiser.{wanted}"]
        assert any(isinstance(event, NoticeEvent) for event in events) == (capability is HOPPER)
        latents += [event.latents for event in events if isinstance(event, ImageEvent)]
    assert 0 < relative_error(latents[0], latents[1]) < 0.05


def test_a_session_whose_plan_changes_the_program_frees_the_other(int8: Bundle) -> None:
    executor = cuda_executor(int8, budget=1 << 40, device=OrtDevice("cpu"))
    pipeline = Pipeline.on(int8, executor)
    job = pipeline.prepare(Request("a red fox", size=(64, 64), steps=1, seed=7))
    list(pipeline.run(job))
    kept = executor._sessions[Program.DENOISER]
    list(pipeline.run(job))
    assert executor._sessions[Program.DENOISER] is kept
    changed = replace(job, plan=replace(executor.plan(work_of(job)), denoiser=CUDA_WEIGHT_ONLY))
    list(pipeline.run(changed))
    assert executor._sessions[Program.DENOISER] is not kept


def work_of(job: Job) -> Work:
    return Work(geometry=job.geometry, tokens=len(job.ids))


def test_a_gpu_that_does_not_multiply_bytes_is_one_line(int8: Bundle) -> None:
    with raises_with(ExecutorError, "int8", "6.1", "fp16"):
        cuda_executor(int8, budget=8 * GIB, capability=(6, 0))


def test_plan_shows_other_bundles(int8: Bundle, capsys: Capture) -> None:
    lines = call_rt(capsys, "plan", int8.root, "--size", "512x512", "--vram", "8GiB").lines
    (others,) = [line for line in lines if line.startswith("other bundles")]
    assert_facts(others, "bf16", "int4", "fits")
    assert len(memory_amounts(others)) == 2
    assert all(amount < 8 for amount in memory_amounts(others))
    (advice,) = [line for line in lines if line.startswith("advice")]
    assert_facts(advice, "bf16")
    found = json.loads(call_rt(capsys, "plan", int8.root, "--size", "512x512", "--gpu", "sm75", "--json").out)
    assert set(found["other_bundles"]) == {"fp16", "int4"}
    assert found["denoiser"] == CUDA_WEIGHT_ONLY
    assert_one_line_error(call_rt(capsys, "plan", int8.root, "--vram", "0.1GiB"), "--vram")
    assert int8.manifest.executors == {CPU, CUDA, WEBGPU}
