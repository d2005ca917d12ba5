"""Block programs computed by torch, in the types that TensorRT would use, on the stand-in device: what they cost in
accuracy. `benchmarks/gpu_torch_engines.py` runs the same on a GPU."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_engines
from device_stand_in import StandInDevice
from executor_tools import EVERYTHING
from leftovers import REPOSITORY
from onnx_engines import twin_spec
from parity import relative_error
from sessions import session
from torch_engines import CudaMemory, StandInMemory, TorchEngines

from zimage_export.engines.build import bundle_blocks
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.executors.tensorrt.executor import TensorRtExecutor
from zimage_runtime.machine.gpu_targets import Variant
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.pipeline import Pipeline, Request

pytestmark = pytest.mark.deep

IDS = tuple(np.random.default_rng(0).integers(0, 320, 40).tolist())
SIZE = (48, 80)


@contextlib.contextmanager
def on_torch(bundle: Path, variant: Variant) -> Iterator[Pipeline]:
    opened = Bundle.open(bundle)
    programs = bundle_blocks(opened, variant)
    spec, device = twin_spec(opened, programs), StandInDevice(track=False)
    engines = TorchEngines(StandInMemory(device), programs, spec)
    executor = TensorRtExecutor(opened, device, engines, spec, EVERYTHING)
    try:
        yield Pipeline.on(opened, executor)
    finally:
        executor.close()


def parts(pipeline: Pipeline, hidden: FloatArray | None = None) -> dict[str, FloatArray]:
    """What each stage computes from the same inputs; `hidden` are the reference's hidden states."""
    opened = session(pipeline)
    found = {"text": pipeline.hidden_states(opened, IDS)}
    geometry = image_geometry(*SIZE, pipeline.bundle.manifest.config)
    schedule = pipeline.prepare(Request("x", size=SIZE, steps=2)).schedule
    conditioning = pipeline.conditioning(geometry, schedule, found["text"] if hidden is None else hidden)
    latents = pipeline.initial_latents(geometry, (1,))
    found["velocity"] = opened.denoiser(conditioning)(latents, 1)
    found["image"] = opened.decode(latents[:, :, :2, :4])
    return found


@pytest.fixture(scope="module")
def exact(bundle: Path) -> dict[str, FloatArray]:
    """The same in float32, on the `cpu` executor."""
    with Pipeline.from_bundle(bundle, "cpu") as pipeline:
        return parts(pipeline)


GATES = {  # relative error of hidden states, velocity and image: one and a half times what was measured
    (Precision.BF16, Variant.AMPERE): (0.009, 0.0105, 0.025),
    (Precision.FP16, Variant.TURING): (0.0011, 0.0015, 0.0006),
    (Precision.INT8, Variant.AMPERE): (0.029, 0.031, 0.025),
}


@pytest.mark.parametrize(("precision", "variant"), GATES)
def test_block_programs_in_their_own_types_are_as_near_as_these_are(
    bundle_in: Callable[[Precision], Path], exact: dict[str, FloatArray], precision: Precision, variant: Variant
) -> None:
    bundle = bundle_in(precision)
    with on_torch(bundle, variant) as pipeline:
        found = parts(pipeline, exact["text"])
    for gate, (name, values) in zip(GATES[precision, variant], found.items(), strict=True):
        error = relative_error(values, exact[name])
        assert gate / 10 < error < gate, f"{name}: {error:.2e}"


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """torch's settings for products and convolutions on a GPU are afterwards as they were."""
    places = [(torch.backends.cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic")]
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [(place, name, getattr(place, name)) for place, name in [*places, *((matmul, name) for name in names)]]
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def test_what_a_context_keeps_is_never_where_a_graph_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads and runs use two pools, and no run uses torch's common one."""
    pools: list[object] = []
    seen: dict[str, object] = {}

    @contextlib.contextmanager
    def use(pool: object, *device: object) -> Iterator[None]:
        pools.append(pool)
        yield
        pools.pop()

    def to_torch(array: object) -> Any:
        seen["upload"] = pools[-1]
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "MemPool", lambda: object(), raising=False)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use, raising=False)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: stream, raising=False)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch_engines, "to_torch", to_torch)
    with kept_settings():
        memory = CudaMemory()
    memory.device = torch.device("cpu")

    def run() -> None:
        seen["run"] = pools[-1]
        memory.upload(np.zeros(1))

    memory.queue("a block", [], [], run, 1)
    assert seen["run"] is not seen["upload"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8])
def test_every_check_passes(bundle_in: Callable[[Precision], Path], precision: Precision, tmp_path: Path) -> None:
    script, out = REPOSITORY / "benchmarks" / "gpu_torch_engines.py", tmp_path / "checks.json"
    words = [bundle_in(precision), "--stand-in", "--size", "32", "--steps", "2", "--limit", "120", "--out", out]
    done = subprocess.run([sys.executable, "-B", script, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    named = [check for check in checks if "check" in check]
    assert len(named) >= 12
    assert all(check["ok"] for check in named)
