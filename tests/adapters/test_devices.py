"""LoRA on the executors for GPUs: with the CPU in the GPU's place, and on a software adapter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from lora_tools import CASE, drawn, everywhere, products
from parity import Drawing, relative_error
from webgpu_adapter import require_adapter

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import (
    CUDA,
    CUDA_BLOCKS,
    CUDA_WEIGHT_ONLY,
    WEBGPU,
    WEBGPU_FUSED,
    Precision,
    extended,
)
from zimage_runtime.executors.ort.cuda import cuda_executor
from zimage_runtime.executors.ort.device import OrtDevice
from zimage_runtime.executors.protocol import UNLIMITED
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline, Request

Extended = Callable[[Precision], Path]
Loras = tuple[tuple[Path, float], ...]


def check_executor(pipeline: Pipeline, cpu: Path, loras: Loras, limit: float) -> None:
    """A, A with LoRA, A; and the second is the `cpu` executor's image."""
    first, second, third = drawn(pipeline), drawn(pipeline, *loras), drawn(pipeline)
    assert np.array_equal(first.latents, third.latents)
    assert np.array_equal(first.pixels, third.pixels)
    with Pipeline.from_bundle(cpu, "cpu") as reference:
        expected = drawn(reference, *loras)
    assert relative_error(first.latents, expected.latents) > 0.3
    assert relative_error(second.latents, expected.latents) < limit
    job = pipeline.prepare(Request(CASE.prompt, size=CASE.size, loras=loras))
    plain = pipeline.prepare(Request(CASE.prompt, size=CASE.size))
    assert job.plan.peak - plain.plan.peak == job.plan.document()["lora"] > 0


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Loras:
    folder = tmp_path_factory.mktemp("lora")
    return (everywhere(folder / "all.safetensors"), 0.4), (products(folder / "lokr.safetensors"), -0.3)


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Drawing:
    return drawn(Pipeline.from_bundle(bundle, "cpu"))


def test_cudas_programs_with_the_cpu_in_the_gpus_place(extended_in: Extended, loras: Loras, plain: Drawing) -> None:
    root = extended_in(Precision.FP32)
    opened = Bundle.open(root)
    with Pipeline.on(opened, cuda_executor(opened, budget=1 << 40, device=OrtDevice("cpu"))) as pipeline:
        assert relative_error(drawn(pipeline).latents, plain.latents) < 1e-5
        check_executor(pipeline, root, loras, 1e-5)


@pytest.mark.slow  # a software adapter takes a minute for both
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_webgpus_programs_on_an_adapter(precision: Precision, extended_in: Extended, loras: Loras) -> None:
    require_adapter()
    from zimage_runtime.executors.ort.webgpu import webgpu_executor
    from zimage_runtime.executors.ort.webgpu_adapters import find_adapter

    root = extended_in(precision)
    opened = Bundle.open(root)
    with Pipeline.on(opened, webgpu_executor(opened, find_adapter(), budget=UNLIMITED)) as pipeline:
        # the CPU's int8 rounds activations, too
        check_executor(pipeline, root, loras, 1e-4 if precision is Precision.FP32 else 0.05)


@pytest.mark.parametrize("precision", Precision)
def test_what_extended_programs_there_are(precision: Precision, extended_in: Extended) -> None:
    manifest = Bundle.open(extended_in(precision)).manifest
    names = {extended(CUDA)}
    if precision is not Precision.BF16:  # of which WebGPU has none
        names |= {extended(WEBGPU), extended(WEBGPU_FUSED)}
    if precision is Precision.INT8:
        names |= {extended(CUDA_WEIGHT_ONLY), extended(CUDA_BLOCKS)}
    found = {name for name in manifest.programs[Program.DENOISER] if name.endswith("-extended")}
    assert found == names | {"cpu-extended"}
    for name in found:
        record = manifest.record(Program.DENOISER, name)
        base = manifest.record(Program.DENOISER, name.removesuffix("-extended"))
        assert record is not None
        assert base is not None
        assert record.weight_bytes == base.weight_bytes
        graph = onnx.load(extended_in(precision) / record.path, load_external_data=False).graph
        assert sum(value.name.startswith("lora.") for value in graph.input) == 7 * (5 * 7 + 2)
