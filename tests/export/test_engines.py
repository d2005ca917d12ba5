"""Engines built by TensorRT for RTX itself, without a GPU, at the published widths: what its build log shows.

The log names every fused kernel with the types and shapes of what it reads and writes. These tests fail when a graph
degrades: an attention that is no longer fused, a product that is no longer of integers, a copy that only moves data.
"""

import dataclasses
import functools
import itertools
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_graphs_full_size import PUBLISHED

from zimage_export.engines import build as export_engines
from zimage_export.engines.block_graphs import BlockProgram, build_blocks
from zimage_export.engines.build import half_type, measure_scratch, program_spec
from zimage_export.engines.types import EngineTypes
from zimage_export.graphs.layers import Layers
from zimage_export.graphs.tensorrt_layers import TensorRtLayers
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.executors.tensorrt.stage_sizes import BAND_POSITIONS
from zimage_runtime.executors.tensorrt.trt_api import Built, Library
from zimage_runtime.machine.gpu_targets import GpuTarget, Variant
from zimage_runtime.model.blocks import BlockKind, all_blocks
from zimage_runtime.model.linears import Linear

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(
        find_spec("tensorrt_rtx") is None
        and not (sys.platform == "linux" and platform.machine() == "x86_64")
        and not (sys.platform == "win32" and platform.machine() == "AMD64"),
        reason="TensorRT for RTX has no wheel for this platform",
    ),
]

ENDS = ("t_embedder.", "cap_embedder.", "all_x_embedder.", "all_final_layer.")
TOKENS = 4224  # of a 1024 x 1024 image and its caption
MOST_BYTES = 3_000_000  # of an engine, of every precision and generation
MOST_SECONDS = 10.0  # of a set, for one generation

GENERATIONS = [GpuTarget.SM80, GpuTarget.SM86, GpuTarget.SM89, GpuTarget.SM120, GpuTarget.PORTABLE]
COMBINATIONS = [
    *itertools.product(("bf16", "fp16", "int8"), GENERATIONS),
    *itertools.product(("fp16", "int8"), [GpuTarget.SM75]),
]


@functools.cache
def programs(precision: str, variant: Variant) -> dict[str, BlockProgram]:
    """Block programs of the published model, stored as a bundle of the precision stores it."""
    storage = {"bf16": DType.BF16, "fp16": DType.F16, "int8": DType.I8}[precision]

    def stored(component: str, name: str, shape: tuple[int, ...]) -> DType:
        if len(shape) < 2 or name.startswith(ENDS):
            return DType.F32
        return DType.BF16 if component == "vae" else storage

    types = EngineTypes(stored, variant, half_type(precision, variant))
    return {program.name: program for program in build_blocks(PUBLISHED, types, {}, lora=True)}


@dataclass(frozen=True)
class Kernel:
    """A line of the build log."""

    name: str
    kind: str
    inputs: list[tuple[list[int], str]]  # dimensions, -1 where free, and type
    outputs: list[tuple[list[int], str]]

    @property
    def parts(self) -> list[str]:
        """What was fused, as TensorRT abbreviates it: CastMulMean → Cast, Mul, Mean."""
        return re.findall(r"[A-Z][a-z]+", self.name.removeprefix("__myl_").rpartition("_myl0")[0])


def kernels(built: Built) -> list[Kernel]:
    """The kernels in the order that they run."""
    found = []
    for name, kind, rest in re.findall(r"^Name: (\S+), LayerType: (\w+), Inputs: (.*)$", built.log, re.MULTILINE):
        if kind in ("signal", "wait", "shape_call"):
            continue
        inputs, _, outputs = rest.partition("Outputs: [")
        values = [
            [
                ([int(size) for size in dims.split(",") if size], dtype)
                for dims, dtype in re.findall(r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)", text)
            ]
            for text in (inputs.partition("Constants: [")[0], outputs)
        ]
        found.append(Kernel(name, kind, values[0], values[1]))
    assert found, "the log has no kernels: has its form changed?"
    return found


def build(program: BlockProgram, gpu: GpuTarget, most: int = TOKENS) -> Built:
    spec = program_spec(program, PUBLISHED, "", most)
    return Library().build(program.model.SerializeToString(), spec, [gpu], detailed=True)


@functools.cache
def block(precision: str, gpu: GpuTarget) -> Built:
    return build(programs(precision, gpu.variant)["transformer_block"], gpu)


def score_buffers(built: Built) -> list[str]:
    """TileKernels that write something of [tokens, tokens]."""
    return [k.name for k in kernels(built) for dims, _ in k.outputs if dims.count(-1) > 1]


def only_moves(built: Built) -> list[str]:
    """TileKernels that compute nothing: transposes and copies of whole activations."""
    moves = {"Tran", "Move", "Resh", "Repl", "Conc", "Slic", "Spli", "Gath"}
    return [k.name for k in kernels(built) if k.kind == "kgen" and k.parts and set(k.parts) <= moves]


def map_moves(built: Built) -> list[str]:
    """TileKernels that only bring a whole map into another layout."""
    moves = {"Tran", "Move", "Cast", "Resh"}
    maps = [k for k in kernels(built) if any(len(dims) == 4 and dims.count(-1) > 1 for dims, _ in k.outputs)]
    return [k.name for k in maps if k.kind == "kgen" and set(k.parts) <= moves]


@pytest.mark.parametrize(("precision", "gpu"), COMBINATIONS)
def test_the_transformer_block(precision: str, gpu: GpuTarget) -> None:
    built = block(precision, gpu)
    assert len(built.data) < MOST_BYTES
    names = [kernel.name for kernel in kernels(built)]
    assert [name for name in names if "mha" in name], "the attention is one kernel"
    assert not score_buffers(built)
    assert not only_moves(built)
    assert len(names) == 12
    memory = built.activation_bytes
    assert memory is not None
    scores = 30 * TOKENS**2 * 2
    assert memory < 510e6 < scores, "scores of all heads would take more than all that is allowed"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_transformer_block_with_lora(precision: str) -> None:
    """Beside the products of the block, two for each linear. What is only copied are their matrices, whose rank is
    free: they are filled up for the kernels; in 16 bits, the attention's values are laid out once, for two products."""
    built = build(programs(precision, Variant.AMPERE)["transformer_block-extended"], GpuTarget.SM89)
    assert len(built.data) < MOST_BYTES
    found = kernels(built)
    assert len([kernel for kernel in found if "mha" in kernel.name]) == 1
    assert all(".lora." in name for name in score_buffers(built)), "of [tokens, rank]"
    products = [k for k in found if k.kind in ("gemm", "runtime_fusion") and ".lora" not in k.name]
    assert [weight_of(k) for k in products if any(-1 not in d and np.prod(d) > 10**6 for d, _ in k.inputs)] == PRODUCTS
    moves = [kernel for kernel in found if kernel.name in only_moves(built)]
    filled = [kernel for kernel in moves if kernel.parts == ["Move", "Repl", "Conc"]]
    assert len(filled) == 14
    assert len(moves) - len(filled) == (0 if precision == "int8" else 1)
    assert len(found) <= 45
    assert (built.activation_bytes or 0) < 580e6


PRODUCTS = [[1, 3840, 3 * 3840], [1, 3840, 3840], [1, 3840, 2 * 10240], [1, 10240, 3840]]
"""Queries, keys and values are one product, and so are gate and up."""


def weight_of(product: Kernel) -> list[int]:
    """The dimensions of what a product multiplies by, as the second factor."""
    return next(dims for dims, _ in product.inputs if -1 not in dims and np.prod(dims) > 10**6)


@pytest.mark.parametrize("gpu", [*GENERATIONS, GpuTarget.SM75])
def test_w8a8_multiplies_integers(gpu: GpuTarget) -> None:
    """All linears; their weights are read as int8, and so are the activations, quantized in the kernel before."""
    products = [k for k in kernels(block("int8", gpu)) if k.kind == "gemm"]
    assert [weight_of(product) for product in products] == PRODUCTS, "as they come, with no kernel that moves them"
    for product in products:
        assert [dtype for _, dtype in product.inputs][:2] == ["Int8", "Int8"], product.name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_products_are_of_the_precisions_own_type(precision: str) -> None:
    dtype = {"bf16": "BFloat16", "fp16": "Half"}[precision]
    products = [k for k in kernels(block(precision, GpuTarget.PORTABLE)) if k.kind in ("gemm", "runtime_fusion")]
    assert [weight_of(product) for product in products] == PRODUCTS
    for product in products:
        weights = [found for dims, found in product.inputs if -1 not in dims and np.prod(dims) > 10**6]
        assert weights == [dtype]


@pytest.mark.parametrize(("precision", "gpu"), COMBINATIONS)
def test_the_text_layer(precision: str, gpu: GpuTarget) -> None:
    """Causal, and four queries share a key: fused all the same, mask and all, and nothing is only moved."""
    built = build(programs(precision, gpu.variant)["text_layer"], gpu, 512)
    assert len(built.data) < MOST_BYTES
    found = kernels(built)
    assert {kernel.kind for kernel in found} <= {"gemm", "kgen", "runtime_fusion"}, "no kind that only changes layouts"
    assert len([kernel for kernel in found if "mha" in kernel.name]) == 1
    assert not score_buffers(built)
    assert only_moves(built) == []
    assert len(found) == (13 if precision == "int8" else 12 if gpu is GpuTarget.SM75 else 11)
    assert len([kernel for kernel in found if kernel.kind in ("gemm", "runtime_fusion")]) == 4
    assert (built.activation_bytes or 0) < 46e6


@pytest.mark.parametrize(("variant", "gpu"), [(Variant.AMPERE, GpuTarget.PORTABLE), (Variant.TURING, GpuTarget.SM75)])
@pytest.mark.parametrize("name", ["caption_embedder", "image_embedder", "final_layer"])
def test_the_ends(name: str, variant: Variant, gpu: GpuTarget) -> None:
    built = build(programs("fp16", variant)[name], gpu, 512)
    assert len(built.data) < MOST_BYTES
    assert len(kernels(built)) <= 4


AUTOENCODER = [
    "decoder_in", "resnet", "middle_attention", "upsample", "resnet_2", "resnet_3", "upsample_2", "resnet_4",
    "resnet_5", "decoder_out", "decoder_tile", "decoder_tile_2", "decoder_tile_3", "decoder_tile_4", "decoder_tile_5",
    "decoder_tile_6", "decoder_tile_7", "encoder_in", "downsample", "resnet_6", "downsample_2", "resnet_7",
    "downsample_3", "encoder_out",
]  # fmt: skip


@pytest.mark.parametrize(("variant", "gpu"), [(Variant.AMPERE, GpuTarget.PORTABLE), (Variant.TURING, GpuTarget.SM75)])
def test_the_autoencoder(variant: Variant, gpu: GpuTarget) -> None:
    """Never fp16 but for the attention's products on Turing; no map is held in float32 where bf16 can be had."""
    found = programs("fp16", variant)
    scales = {place.key: place.scale for place in all_blocks(PUBLISHED)}
    assert [each for each in found if found[each].kind.component == "vae"] == AUTOENCODER
    for each in AUTOENCODER:
        program = found[each]
        built = build(program, gpu, 64 * max(scales[key] for key in program.scalars))
        assert len(built.data) < MOST_BYTES, each
        maps = [dtype for k in kernels(built) for dims, dtype in k.outputs if dims.count(-1) > 1 and len(dims) == 4]
        if program.kind is BlockKind.DECODER_TILE:
            (convolution,) = [k for k in kernels(built) if k.kind == "correlation"]
            half = "Float" if variant is Variant.TURING else "BFloat16"
            assert {dtype for _, dtype in convolution.inputs} == {half}, each
            assert len(kernels(built)) <= 5, each
        elif each != "middle_attention":
            assert set(maps) <= ({"Float"} if variant is Variant.TURING else {"BFloat16", "Float"}), each
            assert len(map_moves(built)) <= 2, "one where a map comes in, one where it goes out"
        if variant is Variant.AMPERE and program.kind is BlockKind.RESNET:
            assert maps.count("BFloat16") > 2 * maps.count("Float"), each


ONE_SET = [("int8", GpuTarget.PORTABLE), ("fp16", GpuTarget.SM75)]  # the others take as long


@pytest.mark.parametrize(
    ("precision", "gpu"),
    [*ONE_SET, *(pytest.param(*each, marks=pytest.mark.slow) for each in COMBINATIONS if each not in ONE_SET)],
)
def test_a_set_of_engines_is_small_and_built_in_seconds(precision: str, gpu: GpuTarget) -> None:
    """As they are in a bundle, with their full profiles. Processor time: other work adds little to it."""
    found = programs(precision, gpu.variant)
    build(found["final_layer"], gpu, 512)  # what the library does once
    before = time.process_time()
    for name, program in found.items():
        spec = program_spec(program, PUBLISHED, "")
        built = Library().build(program.model.SerializeToString(), spec, [gpu], detailed=True)
        assert len(built.data) < MOST_BYTES, name
    assert time.process_time() - before < MOST_SECONDS


@pytest.mark.parametrize("variant", Variant)
def test_attention_of_the_autoencoder_takes_memory_by_the_position(variant: Variant) -> None:
    """Of a few queries at a time. All at once, the scores of 256 x 256 positions would take 17 GB."""
    program = programs("bf16", variant)["middle_attention"]
    gpu = GpuTarget.SM75 if variant is Variant.TURING else GpuTarget.PORTABLE
    points = measure_scratch(Library(), program, PUBLISHED, gpu, {})
    assert [positions for positions, _ in points] == [64**2, 128**2, 256**2]
    for positions, nbytes in points:
        assert 4 * BAND_POSITIONS < nbytes / positions < 4 * BAND_POSITIONS + 24 * 512, "scores twice, and maps"


@pytest.mark.parametrize(("name", "sizes"), [("text_layer", (192,)), ("transformer_block", (1056,))])
def test_the_plan_has_what_sizes_between_those_measured_need(name: str, sizes: tuple[int, ...]) -> None:
    program = programs("bf16", Variant.AMPERE)[name]
    points = measure_scratch(Library(), program, PUBLISHED, GpuTarget.PORTABLE, {})
    spec = dataclasses.replace(program_spec(program, PUBLISHED, ""), scratch=points)
    for tokens in sizes:
        needed = build(program, GpuTarget.PORTABLE, tokens).activation_bytes
        assert needed is not None
        assert needed <= spec.scratch_bytes(tokens) < needed + needed // 10 + (8 << 20)


def test_an_engine_leaves_no_tensor_to_an_allocation_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the builder's flag, TensorRT for RTX reports a third of a gigabyte and allocates the rest by itself."""
    monkeypatch.setattr(export_engines, "BAND_POSITIONS", 256**2)
    built = build(programs("bf16", Variant.AMPERE)["middle_attention"], GpuTarget.PORTABLE, 256)
    assert (built.activation_bytes or 0) > 2 * 2 * 256**4, "the scores, and their softmax"


def test_float32_is_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx as trt

    set_to: list[bool] = []
    build_network = trt.Builder.build_serialized_network

    def watched(builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig) -> object:
        set_to.append(config.get_flag(trt.BuilderFlag.TF32))
        return build_network(builder, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", watched)
    build(programs("bf16", Variant.AMPERE)["final_layer"], GpuTarget.PORTABLE, 512)
    assert set_to == [False]


# What the assertions above are for: graphs that are still right, but degraded


def test_an_attention_that_is_not_fused_is_noticed() -> None:
    """The scores go through float32, as a careful hand might write them."""
    program = programs("bf16", Variant.AMPERE)["transformer_block"]
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    scores, weights = softmax.input[0], softmax.output[0]
    softmax.input[0], softmax.output[0] = f"{scores}.clipped", f"{weights}.again"
    limit = numpy_helper.from_array(np.array([0.0], np.float32), "limit")
    half = onnx.helper.make_node("Cast", ["limit"], ["limit.half"], to=onnx.TensorProto.BFLOAT16)
    sort = onnx.helper.make_node("CumSum", [scores, "axis"], [f"{scores}.clipped"])
    again = onnx.helper.make_node("Mul", [f"{weights}.again", "limit.half"], [weights])
    axis = numpy_helper.from_array(np.array(-1, np.int64), "axis")
    model.graph.initializer.extend([limit, axis])
    place = list(model.graph.node).index(softmax)
    for offset, node in ((0, half), (1, sort), (3, again)):
        model.graph.node.insert(place + offset, node)
    broken = BlockProgram(program.name, program.kind, model, program.scalars)
    built = build(broken, GpuTarget.PORTABLE, 512)
    assert score_buffers(built)
    assert not [k for k in kernels(built) if "mha" in k.name]


def test_scales_inside_the_dequantization_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are dequantized by the channel before the product: weight-only int8, in effect."""

    def w8a16(self: TensorRtLayers, x: str, linears: Sequence[Linear], name: str) -> str:
        b, shape = self.b, (sum(linear.out_width for linear in linears), linears[0].in_width)
        weight = b.weight(f"{name}.weight", shape, DType.I8)
        scale = b.cast(b.weight(f"{name}.weight_scale", (shape[0], 1), DType.F32), self.compute)
        weight = b.op(
            "Mul", b.op("Cast", weight, name=f"{name}.cast", to=onnx.TensorProto.BFLOAT16), scale, name=f"{name}.w"
        )
        b.typed(weight, self.compute)
        return b.op("MatMul", b.cast(x, self.compute), self._transposed(weight, shape, name), name=name)

    monkeypatch.setattr(TensorRtLayers, "_product", w8a16)
    broken = programs.__wrapped__("int8", Variant.AMPERE)["transformer_block"]
    products = [k for k in kernels(build(broken, GpuTarget.PORTABLE, 512)) if k.kind in ("gemm", "runtime_fusion")]
    assert not any([dtype for _, dtype in k.inputs][:2] == ["Int8", "Int8"] for k in products)


def test_weights_that_are_transposed_first_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A two-dimensional Transpose of the weight is the natural thing to write, and costs a kernel a linear."""

    def transposed(self: TensorRtLayers, weight: str, shape: tuple[int, int], name: str) -> str:
        return self.b.op("Transpose", weight, name=f"{name}.transposed", perm=[1, 0])

    monkeypatch.setattr(TensorRtLayers, "_transposed", transposed)
    broken = programs.__wrapped__("bf16", Variant.AMPERE)["transformer_block"]
    assert only_moves(build(broken, GpuTarget.PORTABLE, 512))


def test_values_that_are_copied_out_of_the_joined_product_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(self: TensorRtLayers, k: str, v: str, heads: int, name: str) -> list[str]:
        return [self._heads(x, heads) for x in (k, v)]

    monkeypatch.setattr(TensorRtLayers, "_keys_and_values", apart)
    broken = programs.__wrapped__("bf16", Variant.AMPERE)["transformer_block"]
    assert len(only_moves(build(broken, GpuTarget.PORTABLE, 512))) == 1


def test_copies_around_the_attention_operator_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's own operator is the natural thing to write: the values before it and the result after it are copied."""
    monkeypatch.setattr(TensorRtLayers, "causal_attention", Layers.causal_attention)
    broken = programs.__wrapped__("bf16", Variant.AMPERE)["text_layer"]
    assert len(only_moves(build(broken, GpuTarget.PORTABLE, 512))) == 2
