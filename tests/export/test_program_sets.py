"""The exporter's registry: an executor is a layers file and a line; every bundle then gets its programs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from zimage_export.build import BuildOptions, build
from zimage_export.graphs import PROGRAM_SETS, build_programs
from zimage_export.graphs.builder import GraphBuilder
from zimage_export.graphs.layers import Layers
from zimage_export.graphs.program_set import ON_DEVICE, ProgramSet, TypePolicy
from zimage_export.measure.self_check import fixed_inputs
from zimage_export.storage.precision import StoragePolicy
from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import (
    CPU,
    CUDA,
    CUDA_BLOCKS,
    CUDA_WEIGHT_ONLY,
    WEBGPU,
    WEBGPU_FUSED,
    Manifest,
    Precision,
)
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program

# --- what a layers file of another executor consists of ---------------------------------------------------------------


@dataclass(frozen=True)
class WindLayers(Layers):
    """Layers for a device that has no fused SiLU."""

    def silu(self, x: str, name: str) -> str:
        """x / (1 + exp(-x))."""
        b = self.b
        power = b.op("Exp", b.op("Neg", x, name=f"{name}.negative"), name=f"{name}.power")
        return b.op("Div", x, b.op("Add", power, b.number(1.0), name=f"{name}.more"), name=name)


def wind_layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return WindLayers(b)


WIND_PROGRAMS = ProgramSet("wind", wind_layers, precisions=(Precision.FP32,), standard=False)

# ----------------------------------------------------------------------------------------------------------------------


def test_another_executor_is_one_line_in_the_registry(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROGRAM_SETS, "wind", WIND_PROGRAMS)  # the line
    bundle = build(checkpoint, tmp_path / "bundle", BuildOptions(), Progress(quiet=True))
    records = bundle.manifest.programs
    assert {program for program in MODEL_PROGRAMS if "wind" in records[program]} == set(ON_DEVICE)
    assert (bundle.root / "transformer" / "denoiser.wind.onnx").is_file()
    feeds = fixed_inputs(bundle.manifest.config)[Program.DENOISER]
    (velocity,) = run(bundle, "wind").run(None, feeds)
    expected = HostPrograms(bundle).run(Program.DENOISER, feeds)["velocity"]
    assert not np.array_equal(velocity, expected)
    np.testing.assert_allclose(velocity, expected, atol=1e-5 * np.abs(expected).max())
    operators = {
        node.op_type
        for node in onnx.load(bundle.program(Program.DENOISER, "wind"), load_external_data=False).graph.node
    }
    assert "Exp" in operators
    assert "Sigmoid" not in operators


def run(bundle: Bundle, executor: str) -> onnxruntime.InferenceSession:
    path = bundle.program(Program.DENOISER, executor)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("precision", Precision)
def test_what_a_bundle_gets(precision: Precision) -> None:
    found: dict[str, set[Program]] = {}
    for graph in build_programs(SMALL.config, StoragePolicy(precision), {}):
        found.setdefault(graph.executor, set()).add(graph.program)
    expected = {CPU: set(MODEL_PROGRAMS), CUDA: set(MODEL_PROGRAMS) - {Program.MODULATION}}
    if precision is Precision.INT8:
        expected |= {CUDA_WEIGHT_ONLY: {Program.DENOISER}, CUDA_BLOCKS: {Program.DENOISER}}
    if precision is not Precision.BF16:  # of which WebGPU has none
        expected |= {WEBGPU: set(ON_DEVICE), WEBGPU_FUSED: {Program.DENOISER}}
    assert found == expected


def test_a_set_is_for_the_precisions_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROGRAM_SETS, "wind", WIND_PROGRAMS)
    for precision in Precision:
        graphs = build_programs(SMALL.config, StoragePolicy(precision), {})
        assert any(graph.executor == "wind" for graph in graphs) is (precision is Precision.FP32)


def test_images_of_a_bundle_match_the_one_that_replaces_it(
    checkpoint: Path, qwen_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only programs have changed; an image may record the hash of all files, as earlier versions did."""

    def renewed(source: Path = checkpoint) -> Manifest:
        return build(source, tmp_path / "bundle", BuildOptions(force=True), Progress(quiet=True)).manifest

    first = renewed()
    assert first.earlier_fingerprints == renewed().earlier_fingerprints == ()
    monkeypatch.setitem(PROGRAM_SETS, "wind", WIND_PROGRAMS)
    second = renewed()
    assert second.files_fingerprint != first.files_fingerprint
    assert second.matches(first.files_fingerprint)
    assert renewed().earlier_fingerprints == second.earlier_fingerprints
    monkeypatch.delitem(PROGRAM_SETS, "wind")
    assert renewed().earlier_fingerprints == (second.files_fingerprint,)
    assert not renewed(qwen_checkpoint).matches(second.files_fingerprint)
