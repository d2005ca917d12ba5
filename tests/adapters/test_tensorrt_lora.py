"""LoRA in TensorRT's block programs: further inputs, on the stand-in device, against the `cpu` executor."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from device_stand_in import StandInDevice
from dora_tools import dora, lokr
from facts import raises_with
from lora_tools import CASE, drawn, everywhere, lora
from onnx_engines import OnnxEngines, twin_spec, twins
from parity import relative_error
from torch_engines import StandInMemory, TorchEngines

from zimage_export.engines.block_graphs import BlockProgram
from zimage_export.engines.build import bundle_blocks
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, Precision
from zimage_runtime.errors import BundleError, MemoryLimitError, RequestError
from zimage_runtime.executors.tensorrt.block_catalog import Catalog, VariantSpec
from zimage_runtime.executors.tensorrt.executor import TensorRtExecutor
from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES, smallest_budget
from zimage_runtime.executors.tensorrt.stage_sizes import STAGES, ImageSizes, block_layout, stage_needs
from zimage_runtime.machine.gpu_targets import Variant
from zimage_runtime.model.block_signatures import EXTENDED_KINDS
from zimage_runtime.model.blocks import all_blocks
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline, Request

EVERYTHING = 1 << 30
Make = Callable[..., tuple[StandInDevice, Pipeline]]


@pytest.fixture
def opened(root: Path) -> Bundle:
    return Bundle.open(root)


@pytest.fixture
def programs(opened: Bundle) -> list[BlockProgram]:
    return twins(opened, lora=True)


@pytest.fixture
def spec(opened: Bundle, programs: list[BlockProgram]) -> VariantSpec:
    return twin_spec(opened, programs)


@pytest.fixture
def make(opened: Bundle, programs: list[BlockProgram], spec: VariantSpec) -> Iterator[Make]:
    """Makes a pipeline on a stand-in device whose memory is exactly the budget. Afterwards, nothing may be left."""
    made: list[tuple[StandInDevice, TensorRtExecutor]] = []

    def make_pipeline(vram: int = EVERYTHING) -> tuple[StandInDevice, Pipeline]:
        device = StandInDevice(limit=vram - CONTEXT_BYTES)
        executor = TensorRtExecutor(opened, device, OnnxEngines(device, programs, spec), spec, vram)
        made.append((device, executor))
        return device, Pipeline.on(opened, executor)

    yield make_pipeline
    for device, executor in made:
        executor.close()
        device.assert_clean()


def request(*loras: tuple[Path, float]) -> Request:
    return Request(CASE.prompt, size=CASE.size, steps=CASE.steps, seed=CASE.seed, loras=loras)


def test_weights_stay_where_they_are_and_the_image_is_the_cpus(
    make: Make, root: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """LoRA and DoRA of every layer; then none; then another one, on the same weights."""
    loras = (
        (everywhere(tmp_path / "low.safetensors", 0.1), 0.7),
        (dora(tmp_path / "dora.safetensors", checkpoint, 1), 0.8),
    )
    other = (lora(tmp_path / "other.safetensors", 2, rank=40), 0.5)
    _, pipeline = make()
    first, second, third = drawn(pipeline), drawn(pipeline, *loras), drawn(pipeline)
    stage = pipeline.executor.stages._stages[Program.DENOISER]  # type: ignore[attr-defined]
    assert np.array_equal(first.latents, third.latents)
    with Pipeline.from_bundle(root, "cpu") as cpu:
        assert relative_error(second.latents, drawn(cpu, *loras).latents) < 1e-5
        assert relative_error(drawn(pipeline, other).latents, drawn(cpu, other).latents) < 1e-5
        again = drawn(pipeline, *loras)
    assert np.array_equal(again.latents, second.latents)
    assert relative_error(second.latents, first.latents) > 0.3
    assert pipeline.executor.stages._stages[Program.DENOISER] is stage  # type: ignore[attr-defined]


def test_a_budget_in_which_blocks_are_streamed(make: Make, spec: VariantSpec, root: Path, tmp_path: Path) -> None:
    """The plan counts LoRA to the byte: the stand-in device has exactly the budget."""
    loras = ((everywhere(tmp_path / "all.safetensors"), 0.5),)
    _, pipeline = make()
    plain = pipeline.prepare(request()).plan
    job = pipeline.prepare(request(*loras))
    assert job.plan.peak > plain.peak
    assert job.plan.document()["lora"] > plain.document()["lora"] == 0
    assert any(line.startswith("lora") for line in job.plan.lines())
    work = job.plan.work  # type: ignore[attr-defined]
    sizes = ImageSizes.of(work.geometry, work.tokens, rank=work.branch_rank)
    config = pipeline.bundle.manifest.config
    least = smallest_budget({program: stage_needs(program, spec, config, sizes) for program in STAGES}, sizes)
    with raises_with(MemoryLimitError, "--vram"):
        make(least - 1)[1].prepare(request(*loras))
    _, streaming = make(least)
    plan = streaming.prepare(request(*loras)).plan
    assert plan.stages[Program.DENOISER].streamed or plan.stages[Program.TEXT_ENCODER].streamed  # type: ignore[attr-defined]
    with Pipeline.from_bundle(root, "cpu") as cpu:
        assert relative_error(drawn(streaming, *loras).latents, drawn(cpu, *loras).latents) < 1e-5


def test_what_block_programs_do_not_take_is_refused(make: Make, tmp_path: Path) -> None:
    _, pipeline = make()
    with raises_with(RequestError, "LoKr", "--executor cuda", "build --lora"):
        pipeline.prepare(request((lokr(tmp_path / "lokr.safetensors", 8, 8), 0.5)))
    large = (lora(tmp_path / "large.safetensors", 1, rank=300), lora(tmp_path / "more.safetensors", 2, rank=300))
    with raises_with(RequestError, 608, 512):
        pipeline.prepare(request(*((path, 1.0) for path in large)))


def test_a_bundle_without_the_programs_names_the_command(opened: Bundle, tmp_path: Path) -> None:
    programs = twins(opened)
    spec, device = twin_spec(opened, programs), StandInDevice(limit=EVERYTHING)
    executor = TensorRtExecutor(opened, device, OnnxEngines(device, programs, spec), spec, EVERYTHING)
    with Pipeline.on(opened, executor) as pipeline, raises_with(BundleError, "zimage-export engines", "--lora"):
        pipeline.prepare(request((everywhere(tmp_path / "all.safetensors"), 0.5)))


def test_extended_programs_take_the_same_weights(opened: Bundle, spec: VariantSpec) -> None:
    """So that a block's buffer serves both; and the catalog's file says all of it."""
    places = [place for place in all_blocks(opened.manifest.config) if place.kind in EXTENDED_KINDS]
    for place in places:
        base, more = spec.program_of(place), spec.program_of(place, lora=True)
        assert dict(more.weights) == dict(base.weights)
        assert block_layout(more, place) == block_layout(base, place)
        assert set(more.branch_shapes(16)) | set(base.profile) == set(more.profile)
        assert not base.branches
    programs = {n: dataclasses.replace(program, path=f"engines/{n}.onnx") for n, program in spec.programs.items()}
    catalog = Catalog({Variant.AMPERE: dataclasses.replace(spec, programs=programs)})
    assert Catalog.from_json(catalog.to_json(), "blocks.json") == catalog


@pytest.mark.deep
@pytest.mark.parametrize(
    ("precision", "variant", "limit"),
    [  # three times what was measured
        (Precision.BF16, Variant.AMPERE, 0.018),
        (Precision.FP16, Variant.TURING, 0.003),
        pytest.param(Precision.INT8, Variant.AMPERE, 0.09, marks=pytest.mark.slow),
    ],
)
def test_in_the_programs_own_types(
    precision: Precision,
    variant: Variant,
    limit: float,
    extended_in: Callable[[Precision], Path],
    root: Path,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    loras = (
        (everywhere(tmp_path / "low.safetensors", 0.1), 0.7),
        (dora(tmp_path / "dora.safetensors", checkpoint, 1), 0.8),
    )
    bundle = Bundle.open(extended_in(precision))
    programs = bundle_blocks(bundle, variant, lora=True)
    spec, device = twin_spec(bundle, programs), StandInDevice(track=False)
    executor = TensorRtExecutor(bundle, device, TorchEngines(StandInMemory(device), programs, spec), spec, EVERYTHING)
    with Pipeline.on(bundle, executor) as pipeline, Pipeline.from_bundle(root, CPU) as cpu:
        plain, expected = drawn(pipeline), drawn(cpu, *loras)
        assert relative_error(plain.latents, expected.latents) > 0.3
        assert relative_error(drawn(pipeline, *loras).latents, expected.latents) < limit
