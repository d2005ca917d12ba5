"""The programs for WebGPU: they compute what the CPU's compute, of operators that WebGPU has, a few scores at a time.

These tests run on the CPU. `test_webgpu_placement` runs the programs on an adapter.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from parity import relative_error
from webgpu_adapter import profiled, run_on_cpu

from zimage_export.graphs import Graph, build_programs
from zimage_export.measure.self_check import fixed_inputs
from zimage_export.storage.precision import StoragePolicy, scale_of
from zimage_export.synthetic.checkpoint import FULL, SMALL
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, WEBGPU, WEBGPU_FUSED, Precision
from zimage_runtime.bundle.stored_weights import dequantized
from zimage_runtime.bundle.tensors import DType, TensorFile, to_float32
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.geometry import (
    ImageGeometry,
    caption_positions,
    image_geometry,
    image_positions,
    padded,
    text_rotary,
    transformer_rotary,
)
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program
from zimage_runtime.model.query_blocks import MOST_SCORES, autoencoder_scores, denoiser_scores

TOLERANCE = 1e-5  # relative

ON_DEVICE = [program for program in MODEL_PROGRAMS if program is not Program.MODULATION]
SERVED = [Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4]

OPERATORS = {
    "Add", "Cast", "Clip", "Concat", "Conv", "CumSum", "DequantizeLinear", "Div", "Expand", "Gather", "Gemm",
    "Identity", "InstanceNormalization", "LayerNormalization", "LessOrEqual", "MatMul", "MatMulNBits", "Mod", "Mul",
    "MultiHeadAttention", "Neg", "Pad", "RMSNormalization", "Reshape", "Resize", "RotaryEmbedding", "Shape", "Sigmoid",
    "Slice", "Softmax", "Split", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""What runs on the device, or on the CPU if it computes shapes, with version 0.4.0 of the provider: measured."""

MOST_BUFFERS = 8  # that every adapter lets a kernel bind: inputs and outputs


def inputs_of(program: Program, size: tuple[int, int], tokens: int, batch: int, config: ModelConfig) -> Any:
    """Random inputs of a program for an image of `size` pixels (width, height) and a prompt of `tokens` tokens."""
    rng = np.random.default_rng(1)
    geometry = image_geometry(*size, config)
    c = config.transformer

    def normal(*shape: int) -> FloatArray:
        return rng.standard_normal(shape, dtype=np.float32)

    latents = normal(batch, c.in_channels, geometry.latent_height, geometry.latent_width)
    text, caption = text_rotary(tokens, config.text_encoder), transformer_rotary(caption_positions(padded(tokens)), c)
    image = transformer_rotary(image_positions(geometry, padded(tokens)), c)
    hidden = normal(1, tokens, c.cap_feat_dim)
    return {
        Program.TEXT_ENCODER: {"inputs_embeds": hidden, "cos": text.cos, "sin": text.sin},
        Program.CAPTION: {"hidden_states": hidden, "cos": caption.cos, "sin": caption.sin},
        Program.DENOISER: {
            "latents": latents,
            "caption": normal(1, padded(tokens), c.dim),
            "modulation": normal(c.modulated_blocks, 4, c.dim),
            "final_scale": normal(c.dim),
            "image_cos": image.cos,
            "image_sin": image.sin,
            "caption_cos": caption.cos,
            "caption_sin": caption.sin,
        },
        Program.DECODER: {"latents": latents},
        Program.ENCODER: {"image": np.tanh(normal(batch, 3, geometry.height, geometry.width))},
    }[program]


def check(bundle: Bundle, program: Program, feeds: dict[str, FloatArray], name: str = WEBGPU) -> None:
    """A program gives what the CPU's gives."""
    expected = run_on_cpu(bundle.program(program, CPU), program, feeds)
    found = run_on_cpu(bundle.program(program, name), program, feeds)
    assert found.keys() == expected.keys()
    for output, value in found.items():
        assert relative_error(value, expected[output]) < TOLERANCE, output


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("program", ON_DEVICE)
def test_a_program_gives_what_the_cpus_gives(
    program: Program, precision: Precision, bundle_in: Callable[[Precision], Path]
) -> None:
    """In fp16 too: its weights are widened on both."""
    bundle = Bundle.open(bundle_in(precision))
    check(bundle, program, fixed_inputs(bundle.manifest.config)[program])


@pytest.mark.parametrize(
    ("size", "tokens", "batch"),
    [
        ((16, 16), 1, 1),  # fewer latent positions than blocks, and a token of which most are pads
        ((48, 32), 33, 1),  # as many positions as blocks; two rows of a caption
        ((80, 32), 20, 2),  # not square, and a batch
        ((144, 112), 64, 1),  # blocks of several rows, of which the last has fewer
    ],
)
@pytest.mark.parametrize("program", ON_DEVICE)
def test_blocks_of_queries_at_any_size(
    program: Program, size: tuple[int, int], tokens: int, batch: int, bundle: Path
) -> None:
    opened = Bundle.open(bundle)
    check(opened, program, inputs_of(program, size, tokens, batch, opened.manifest.config))


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_fused_attention_gives_the_same(precision: Precision, bundle_in: Callable[[Precision], Path]) -> None:
    bundle = Bundle.open(bundle_in(precision))
    check(bundle, Program.DENOISER, fixed_inputs(bundle.manifest.config)[Program.DENOISER], WEBGPU_FUSED)
    model = onnx.load(bundle.program(Program.DENOISER, WEBGPU_FUSED), load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MultiHeadAttention") == bundle.manifest.config.transformer.modulated_blocks
    assert "Softmax" not in operators


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
@pytest.mark.parametrize(
    ("program", "name"),
    [
        (Program.TEXT_ENCODER, WEBGPU),
        (Program.CAPTION, WEBGPU),
        (Program.DENOISER, WEBGPU),
        (Program.DENOISER, WEBGPU_FUSED),
    ],
)
def test_quantized_weights_are_multiplied_in_float32(
    program: Program, precision: Precision, name: str, bundle: Path, bundle_in: Callable[[Precision], Path]
) -> None:
    """To the float32 program with the values that the integers stand for; the CPU's own also quantizes activations."""
    quantized = Bundle.open(bundle_in(precision))
    feeds = fixed_inputs(quantized.manifest.config)[program]
    (expected,) = with_weights(Bundle.open(bundle), quantized, program, feeds)
    (found,) = run_on_cpu(quantized.program(program, name), program, feeds).values()
    assert relative_error(found, expected) < TOLERANCE


def with_weights(bundle: Bundle, other: Bundle, program: Program, feeds: dict[str, FloatArray]) -> list[FloatArray]:
    """A bundle's program for the CPU, with another bundle's weights in float32."""
    import onnxruntime

    model = onnx.load(bundle.program(program, CPU), load_external_data=False)
    file = TensorFile(other.file(other.manifest.weights[program.component]))
    for tensor in model.graph.initializer:
        if tensor.external_data:
            tensor.CopyFrom(numpy_helper.from_array(value_of(file, tensor.name), tensor.name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[FloatArray] = session.run(None, feeds)
    return outputs


def value_of(file: TensorFile, name: str) -> FloatArray:
    stored, dtype = file.array(name)
    if dtype not in (DType.I8, DType.U8):
        return to_float32(stored, dtype)
    scales = np.asarray(file.array(scale_of(name))[0], np.float32)
    if dtype is DType.I8:
        return np.ascontiguousarray((stored.astype(np.float32) * scales).T)
    return dequantized(stored, scales)


# --- what the programs consist of -------------------------------------------------------------------------------------


def graphs(precision: Precision) -> list[Graph]:
    policy = StoragePolicy(precision, DType.BF16, eight_bits=frozenset({"transformer/layers.0.attention.to_q.weight"}))
    return [g for g in build_programs(SMALL.config, policy, {}) if g.executor in (WEBGPU, WEBGPU_FUSED)]


def faults(graph: Graph) -> list[str]:
    """What the provider has no kernel for, or binds too many buffers for."""
    found = []
    for node in graph.nodes:
        where = f"{node.name} ({node.op_type})"
        if node.op_type not in OPERATORS:
            found.append(f"{where} has no kernel")
        if len(node.input) + len(node.output) > MOST_BUFFERS and node.op_type != "MultiHeadAttention":
            found.append(f"{where} binds {len(node.input) + len(node.output)} buffers")
        if node.op_type == "MultiHeadAttention" and graph.executor != WEBGPU_FUSED:
            found.append(f"{where} is wrong on Vulkan")
        bf16 = [name for name in node.input if graph.types.get(name) is DType.BF16]
        if bf16 and (node.op_type != "Cast" or any(name not in graph.weights for name in bf16)):
            found.append(f"{where} reads bfloat16")
        if node.op_type == "Cast" and next(a.i for a in node.attribute if a.name == "to") != TensorProto.FLOAT:
            found.append(f"{where} computes in less than float32")
    return found


@pytest.mark.parametrize("precision", SERVED)
def test_every_operator_has_a_kernel(precision: Precision) -> None:
    found = graphs(precision)
    assert len(found) == len(ON_DEVICE) + 1
    for graph in found:
        assert faults(graph) == [], (graph.program, graph.executor)


def test_the_check_finds_what_has_none() -> None:
    """The programs for CUDA and the CPU run into each of the faults."""
    policy = StoragePolicy(Precision.BF16, DType.BF16)
    others = {(g.program, g.executor): faults(g) for g in build_programs(SMALL.config, policy, {})}
    assert any("MultiHeadAttention) is wrong" in fault for fault in others[Program.DENOISER, CPU])
    assert any("Attention) has no kernel" in fault for fault in others[Program.DENOISER, CUDA])
    assert any("Split) binds" in fault for fault in others[Program.DENOISER, CUDA])
    assert any("reads bfloat16" in fault for fault in others[Program.DENOISER, CUDA])
    assert any("less than float32" in fault for fault in others[Program.DENOISER, CUDA])


def test_blocks_of_4_bits_are_exact() -> None:
    """At other accuracy levels than 0, the operator quantizes activations or sums in fp16."""
    for graph in graphs(Precision.INT4):
        products = [node for node in graph.nodes if node.op_type == "MatMulNBits"]
        assert {a.i for node in products for a in node.attribute if a.name == "accuracy_level"} <= {0}
        assert products or graph.program.component == "vae"


@pytest.mark.parametrize(
    ("precision", "program", "expected"),
    [
        (Precision.FP16, Program.DENOISER, 2 * 12 * 96 * 96),
        (Precision.INT8, Program.DENOISER, 12 * 96 * 96),
    ],
)
def test_weights_stay_narrow_in_memory(
    precision: Precision, program: Program, expected: int, bundle_in: Callable[[Precision], Path]
) -> None:
    """A block's weights, and a little more for the model's ends, norms and scales."""
    bundle = Bundle.open(bundle_in(precision))
    record = bundle.manifest.programs[program][WEBGPU]
    blocks = bundle.manifest.config.transformer.modulated_blocks
    assert expected * blocks < record.weight_bytes < 1.2 * expected * blocks
    assert bundle.manifest.programs[program][CPU].weight_bytes >= record.weight_bytes


def test_the_autoencoders_bfloat16_is_counted_as_float32(bundle_in: Callable[[Precision], Path]) -> None:
    half, single = Bundle.open(bundle_in(Precision.FP16)), Bundle.open(bundle_in(Precision.FP32))
    stored = half.file(half.manifest.weights["vae"]).stat().st_size
    assert stored < 0.6 * single.file(single.manifest.weights["vae"]).stat().st_size
    for program in (Program.DECODER, Program.ENCODER):
        assert half.manifest.programs[program][WEBGPU] == single.manifest.programs[program][WEBGPU]


# --- scores -----------------------------------------------------------------------------------------------------------


def largest_scores(bundle: Bundle, program: Program, feeds: dict[str, FloatArray], folder: Path) -> int:
    """Bytes of the largest output of a softmax in a run on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    path = bundle.program(program, WEBGPU)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    nodes = profiled(Path(session.end_profiling()))
    shapes = [shape for n in nodes if n["op_name"] == "Softmax" for shape in n["output_type_shape"]]
    assert shapes
    return max(4 * int(np.prod(shape["float"])) for shape in shapes)


@pytest.mark.parametrize(("size", "batch"), [((16, 16), 1), ((48, 32), 1), ((144, 112), 1), ((80, 32), 2)])
def test_scores_take_what_a_plan_computes(size: tuple[int, int], batch: int, bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    config, tokens = opened.manifest.config, 40
    geometry = image_geometry(*size, config)
    denoiser = inputs_of(Program.DENOISER, size, tokens, batch, config)
    expected = denoiser_scores(geometry, tokens, batch, config)
    assert largest_scores(opened, Program.DENOISER, denoiser, tmp_path) == expected
    decoder = inputs_of(Program.DECODER, size, tokens, batch, config)
    assert largest_scores(opened, Program.DECODER, decoder, tmp_path) == autoencoder_scores(geometry, batch)


def scores(side: int) -> tuple[int, int]:
    geometry: ImageGeometry = image_geometry(side, side, FULL.config)
    return denoiser_scores(geometry, 512, 1, FULL.config), autoencoder_scores(geometry)


def test_scores_stay_small_up_to_1536_pixels_with_the_longest_prompt() -> None:
    assert 0.8 * MOST_SCORES < max(scores(1536)) <= MOST_SCORES
    assert min(scores(2048)) > MOST_SCORES


def test_one_head_has_no_group(bundle: Path) -> None:
    """Their number need not be even either: the small model has three."""
    config = Bundle.open(bundle).manifest.config
    geometry = image_geometry(64, 64, config)
    assert config.transformer.n_heads == 3
    single = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, n_heads=1))
    assert denoiser_scores(geometry, 32, 1, config) == 2 * denoiser_scores(geometry, 32, 1, single)
