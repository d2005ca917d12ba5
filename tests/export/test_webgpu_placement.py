"""The programs for WebGPU on an adapter: every value is computed there, and is the CPU's to float32's rounding.

A software adapter will do, and is what CI has: see `webgpu_adapter`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from parity import relative_error
from test_webgpu_programs import SERVED, inputs_of
from webgpu_adapter import require_adapter, run_on_adapter, run_on_cpu

from zimage_export.measure.self_check import fixed_inputs
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import WEBGPU, WEBGPU_FUSED, Precision
from zimage_runtime.model.programs import Program

TOLERANCE = 1e-5  # relative

SHAPE_ARITHMETIC = {"Add", "Concat", "Div", "Gather", "Mod", "Mul", "Neg", "Sub"}
"""What the provider leaves to the CPU, for shapes alone."""


@pytest.fixture(autouse=True)
def adapter() -> None:
    require_adapter()


def check(bundle: Bundle, program: Program, feeds: dict[str, FloatArray], folder: Path) -> None:
    path = bundle.program(program, WEBGPU)
    found, nodes = run_on_adapter(path, program, feeds, folder)
    assert not [node["name"] for node in nodes if node["op_name"].startswith("Memcpy")]
    elsewhere = [node for node in nodes if node["provider"] != "WebGpuExecutionProvider"]
    assert {node["op_name"] for node in elsewhere} <= SHAPE_ARITHMETIC
    assert len(elsewhere) < len(nodes)
    for node in elsewhere:  # of float32 there would be others, too
        assert {kind for shape in node["output_type_shape"] for kind in shape} == {"int64"}, node["name"]
    expected = run_on_cpu(path, program, feeds)
    for output, value in found.items():
        assert relative_error(value, expected[output]) < TOLERANCE, output


@pytest.mark.parametrize("precision", SERVED)
@pytest.mark.parametrize("program", [Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER])
def test_everything_runs_on_the_adapter(
    program: Program, precision: Precision, bundle_in: Callable[[Precision], Path], tmp_path: Path
) -> None:
    bundle = Bundle.open(bundle_in(precision))
    check(bundle, program, fixed_inputs(bundle.manifest.config)[program], tmp_path)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])  # in fp16, its weights are bfloat16
@pytest.mark.parametrize("program", [Program.DECODER, Program.ENCODER])
def test_the_autoencoder_runs_on_the_adapter(
    program: Program, precision: Precision, bundle_in: Callable[[Precision], Path], tmp_path: Path
) -> None:
    bundle = Bundle.open(bundle_in(precision))
    check(bundle, program, fixed_inputs(bundle.manifest.config)[program], tmp_path)


@pytest.mark.parametrize(("size", "tokens", "batch"), [((16, 16), 1, 1), ((80, 32), 40, 2)])
@pytest.mark.parametrize("program", [Program.TEXT_ENCODER, Program.DENOISER, Program.DECODER])
def test_blocks_of_queries_at_any_size(
    program: Program, size: tuple[int, int], tokens: int, batch: int, bundle: Path, tmp_path: Path
) -> None:
    opened = Bundle.open(bundle)
    check(opened, program, inputs_of(program, size, tokens, batch, opened.manifest.config), tmp_path)


@pytest.mark.slow  # lavapipe compiles the fused kernel for minutes
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT4])
def test_the_fused_attention_runs_on_the_adapter(
    precision: Precision, bundle_in: Callable[[Precision], Path], tmp_path: Path
) -> None:
    """Whether it is right depends on the adapter: the executor asks. It is finite and near on all."""
    bundle = Bundle.open(bundle_in(precision))
    path, feeds = bundle.program(Program.DENOISER, WEBGPU_FUSED), fixed_inputs(bundle.manifest.config)[Program.DENOISER]
    found, nodes = run_on_adapter(path, Program.DENOISER, feeds, tmp_path)
    fused = {node["provider"] for node in nodes if node["op_name"] == "MultiHeadAttention"}
    assert fused == {"WebGpuExecutionProvider"}
    assert not [node["name"] for node in nodes if node["op_name"].startswith("Memcpy")]
    expected = run_on_cpu(path, Program.DENOISER, feeds)
    error = relative_error(found["velocity"], expected["velocity"])
    print(f"error of the fused attention on this adapter, {precision}: {error:.1e}")
    assert error < 0.5
