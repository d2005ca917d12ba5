"""bf16 and fp16 bundles: what is stored how, how far they are from the checkpoint, and that they run bounded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from half_emulation import run_cuda_program_on_cpu
from onnx import TensorProto, load
from parity import Case, draw, relative_error

from zimage_export.measure.self_check import fixed_inputs
from zimage_export.storage.precision import StoragePolicy
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CUDA, Precision
from zimage_runtime.bundle.tensors import DType, read_header
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

# measured on the small model and doubled; a wrong graph is off by tenths
LATENTS_GATE = {Precision.BF16: 5e-3, Precision.FP16: 8e-4}
PSNR_GATE = {Precision.BF16: 53.0, Precision.FP16: 62.0}

HALVES = [Precision.BF16, Precision.FP16]


@pytest.fixture(scope="session")
def bundles(bundle_in: Callable[[Precision], Path]) -> dict[Precision, Path]:
    """The same checkpoint in fp32 and in both types of 16 bits."""
    return {precision: bundle_in(precision) for precision in (Precision.FP32, *HALVES)}


@pytest.mark.parametrize("precision", HALVES)
def test_image_is_within_the_precisions_gate_of_diffusers(
    bundles: dict[Precision, Path], diffusers_pipeline: Any, precision: Precision
) -> None:
    from parity import draw_with_diffusers

    pipeline = Pipeline.from_bundle(bundles[precision])
    for case in (Case("a red circle", (80, 64), steps=8, seed=3), Case("白色背景", (64, 96), steps=8, seed=4)):
        (ours,), theirs = draw(pipeline, case), draw_with_diffusers(diffusers_pipeline, case)
        assert relative_error(ours.latents, theirs.latents) <= LATENTS_GATE[precision]
        difference = ours.pixels.astype(np.float64) - theirs.pixels
        assert 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-9)) >= PSNR_GATE[precision]


@pytest.mark.parametrize("precision", HALVES)
def test_only_linears_and_convolutions_are_stored_in_16_bits(
    bundles: dict[Precision, Path], precision: Precision
) -> None:
    root = bundles[precision]
    half = {Precision.BF16: "BF16", Precision.FP16: "F16"}[precision]
    transformer = read_header(root / "transformer" / "weights.safetensors")
    assert transformer["layers.0.attention.to_q.weight"].dtype == half
    assert transformer["layers.0.adaLN_modulation.0.weight"].dtype == half
    for name in ("layers.0.attention_norm1.weight", "x_pad_token", "cap_embedder.1.weight", "t_embedder.mlp.0.weight"):
        assert transformer[name].dtype == "F32", name
    vae = read_header(root / "vae" / "weights.safetensors")
    assert {entry.dtype for entry in vae.values()} == {"BF16", "F32"}
    embeddings = read_header(root / "text_encoder" / "embeddings.safetensors")
    assert embeddings["embed_tokens.weight"].dtype == "BF16"


def test_a_timestep_embedder_stays_bf16_where_that_loses_nothing() -> None:
    name, shape = "t_embedder.mlp.0.weight", (1024, 256)
    for precision, own, stored in (
        (Precision.BF16, DType.BF16, DType.BF16),
        (Precision.BF16, DType.F32, DType.F32),
        (Precision.FP16, DType.BF16, DType.BF16),
        (Precision.FP16, DType.F32, DType.F32),
        (Precision.FP32, DType.BF16, DType.F32),
    ):
        assert StoragePolicy(precision, timestep_type=own).storage("transformer", name, shape) is stored
    policy = StoragePolicy(Precision.BF16, timestep_type=DType.BF16)
    assert policy.storage("transformer", "cap_embedder.1.weight", (192, 128)) is DType.F32


@pytest.mark.parametrize("precision", HALVES)
def test_low_memory_gives_the_same_without_widening_all_weights(
    bundles: dict[Precision, Path], precision: Precision
) -> None:
    bundle = Bundle.open(bundles[precision])
    for program, feeds in fixed_inputs(bundle.manifest.config).items():
        fast = HostPrograms(bundle).run(program, feeds)
        mapped = HostPrograms(bundle, low_memory=True).run(program, feeds)
        for name, value in fast.items():
            assert relative_error(mapped[name], value) < 1e-5, (program, name)


def test_cuda_programs_in_fp32_give_what_the_cpus_give(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for program, feeds in fixed_inputs(opened.manifest.config).items():
        if program is Program.MODULATION:  # always on the CPU
            continue
        expected = HostPrograms(opened).run(program, feeds)
        for name, value in run_cuda_program_on_cpu(opened, program, feeds).items():
            assert relative_error(value, expected[name]) < 1e-5, (program, name)


def test_cuda_programs_in_fp16_stay_near_fp32(bundles: dict[Precision, Path]) -> None:
    exact, half = Bundle.open(bundles[Precision.FP32]), Bundle.open(bundles[Precision.FP16])
    feeds = fixed_inputs(exact.manifest.config)
    for program in (Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER):
        expected = HostPrograms(exact).run(program, feeds[program])
        for name, value in run_cuda_program_on_cpu(half, program, feeds[program]).items():
            assert relative_error(value, expected[name]) < 3e-3, (program, name)


@pytest.mark.parametrize("precision", [Precision.FP32, *HALVES])
def test_cuda_programs_hold_only_standard_operators(bundles: dict[Precision, Path], precision: Precision) -> None:
    bundle = Bundle.open(bundles[precision])
    assert CUDA in bundle.manifest.executors
    for program in MODEL_PROGRAMS:
        if program is Program.MODULATION:
            continue
        model = load(bundle.program(program, CUDA), load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}, program
        products = [node for node in model.graph.node if node.op_type in ("Gemm", "Attention")]
        assert products, program
    if precision is not Precision.FP32:
        element = {Precision.BF16: TensorProto.BFLOAT16, Precision.FP16: TensorProto.FLOAT16}[precision]
        model = load(bundle.program(Program.DENOISER, CUDA), load_external_data=False)
        stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        (node,) = [node for node in model.graph.node if node.name == "layers.0.attention.to_q"]
        assert stored[node.input[1]] == element


def test_manifest_keeps_folds_and_replays_them(bundles: dict[Precision, Path]) -> None:
    document = json.loads((bundles[Precision.FP16] / "manifest.json").read_text())
    folds = document["folds"]["transformer"]
    assert set(folds) == {
        *(f"{kind}.{index}" for kind in ("noise_refiner", "context_refiner") for index in range(2)),
        *(f"layers.{index}" for index in range(3)),
    }
    assert all(fold == {"attention": 6, "ffn": 6, "product": 0} for fold in folds.values())
    assert dict(Bundle.open(bundles[Precision.FP16]).manifest.folds) == document["folds"]
