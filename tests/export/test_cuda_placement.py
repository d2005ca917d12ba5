"""Every node of the programs for CUDA has a kernel there in the types that it is given, and no value has to be copied
between host and device in mid-program.

Without a GPU this reads ONNX Runtime's own table of kernels; where there is one, the test at the end runs the
programs and looks where each node ran. (`benchmarks/gpu.py` does the same and reports it.)
"""

import shutil
from pathlib import Path

import onnx
import pytest
from cuda_kernels import CONTRIB, KERNELS, OTHER_TYPES, SHAPE_INPUTS
from onnx import TensorProto, helper

from benchmarks.gpu_placement import SHAPE_ARITHMETIC, copies, where_nodes_ran
from zimage_export.graphs import PROGRAM_SETS, Graph, Target, build_graphs, build_programs
from zimage_export.graphs.builder import ONNX_TYPES
from zimage_export.storage.precision import StoragePolicy
from zimage_export.synthetic.checkpoint import SMALL, write_checkpoint
from zimage_rt.bench.synthetic import few_blocks
from zimage_runtime.bundle.manifest import CPU, CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY, Precision
from zimage_runtime.bundle.tensors import DType, TensorEntry
from zimage_runtime.model.programs import Program

EIGHT_BITS = "layers.0.attention.to_q.weight"


def programs(precision: Precision) -> dict[str, onnx.ModelProto]:
    """The programs for CUDA of a precision by file name, without weights, with the type of every value."""
    # of int4's layers, one keeps 8 bits: the operator is the same
    policy = StoragePolicy(precision, DType.BF16, eight_bits=frozenset({f"transformer/{EIGHT_BITS}"}))
    return {
        f"{graph.program}.{graph.executor}": typed_model(graph)
        for graph in build_programs(SMALL.config, policy, {})
        if PROGRAM_SETS[graph.executor].executor == CUDA
    }


def typed_model(graph: Graph) -> onnx.ModelProto:
    entries = {
        name: TensorEntry(graph.types.get(name, DType.F32).value, shape, 0, 0) for name, shape in graph.weights.items()
    }
    model = graph.to_model("weights.safetensors", entries)
    for node in model.graph.node:
        if node.domain:  # ONNX does not know what it gives: by its definition, the type of its first input
            dtype = ONNX_TYPES[graph.types.get(node.input[0], DType.F32)]
            model.graph.value_info.append(helper.make_tensor_value_info(node.output[0], dtype, None))
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}


def misplaced(model: onnx.ModelProto, *, folded: bool = False) -> list[str]:
    """What would not run on CUDA, or would need a copy between host and device. `folded`: what is computed of weights
    alone is so when the program is loaded, on the host."""
    types, faults = types_of(model), []
    constants = {tensor.name for tensor in model.graph.initializer}
    on_host: set[str] = set()  # shapes, and what is computed of them
    for node in model.graph.node:
        where = f"{node.name} ({node.op_type})"
        if folded and all(name in constants for name in node.input if name):
            constants.update(node.output)
            continue
        if node.domain and node.op_type not in CONTRIB:
            faults.append(f"{where} is no operator that CUDA has")
            continue
        data = [name for i, name in enumerate(node.input) if name and i not in SHAPE_INPUTS.get(node.op_type, set())]
        shapes = [name for i, name in enumerate(node.input) if name and i in SHAPE_INPUTS.get(node.op_type, set())]
        if node.op_type == "Shape":
            on_host.update(node.output)
            continue
        if any(name in on_host for name in data):
            if node.op_type not in SHAPE_ARITHMETIC or any(n not in on_host and n not in constants for n in node.input):
                faults.append(f"{where} computes with a shape on the device")
            on_host.update(node.output)
            continue
        faults += [f"{where} reads {name} on the host" for name in shapes if name not in on_host | constants]
        for name in data:
            allowed = OTHER_TYPES.get((node.op_type, list(node.input).index(name)), KERNELS.get(node.op_type, set()))
            if types[name] not in allowed:
                faults.append(f"{where} has no kernel for {TensorProto.DataType.Name(types[name])}")
    return faults


@pytest.mark.parametrize("precision", list(Precision))
def test_every_node_has_a_kernel_on_cuda(precision: Precision) -> None:
    for program, model in programs(precision).items():
        assert misplaced(model, folded=CUDA_BLOCKS in program) == [], program


def test_the_check_finds_what_does_not_run() -> None:
    models = programs(Precision.BF16)
    decoder = models["decoder.cuda"]
    for node in decoder.graph.node:
        if node.op_type == "Expand":  # as it was before: there is no Resize in bfloat16
            node.op_type = "Resize"
    assert any("Resize) has no kernel for BFLOAT16" in fault for fault in misplaced(decoder))
    denoiser = models["denoiser.cuda"]
    (slice_node,) = [node for node in denoiser.graph.node if node.op_type == "Slice"]
    slice_node.input[2] = next(node.output[0] for node in denoiser.graph.node if node.op_type == "Cast")
    assert any("Slice) reads" in fault for fault in misplaced(denoiser))
    reshape = next(node for node in denoiser.graph.node if node.op_type == "Reshape")
    reshape.op_type = "Gather"
    assert misplaced(denoiser)


def test_products_of_other_integers_are_found() -> None:
    """CUDA multiplies int8 with int8 alone, where the CPU wants uint8 with int8."""
    denoiser = programs(Precision.INT8)["denoiser.cuda"]
    (zero,) = [tensor for tensor in denoiser.graph.initializer if tensor.name == "int8_zero"]
    zero.data_type = TensorProto.UINT8
    del denoiser.graph.value_info[:]
    faults = misplaced(onnx.shape_inference.infer_shapes(denoiser, strict_mode=True))
    assert any("MatMulInteger) has no kernel for UINT8" in fault for fault in faults)
    (graph,) = build_graphs(SMALL.config, Target(CPU, StoragePolicy(Precision.INT8)), [Program.DENOISER])
    assert any("MatMulIntegerToFloat) is no operator" in fault for fault in misplaced(typed_model(graph)))


def test_blocks_of_4_bits_are_multiplied_in_fp16() -> None:
    """In float32 they would have a kernel, too, and lose what makes them worth having: half the activations."""
    for name, model in programs(Precision.INT4).items():
        if name in ("decoder.cuda", "encoder.cuda"):
            continue
        types = types_of(model)
        products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        found = {tuple(types[name] for name in (*node.input, *node.output)) for node in products}
        assert found == {(TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.FLOAT16, TensorProto.FLOAT16)}


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16, Precision.INT8, Precision.INT4])
def test_long_attention_is_in_16_bits(precision: Precision) -> None:
    """Flash attention has no kernel for float32."""
    for name, model in programs(precision).items():
        if name.startswith(("denoiser", "caption")):
            types = types_of(model)
            found = {types[value] for node in model.graph.node if node.op_type == "Attention" for value in node.input}
            assert found == {TensorProto.BFLOAT16 if precision is Precision.BF16 else TensorProto.FLOAT16}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [precision.value for precision in Precision])
def test_every_node_runs_on_cuda(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    from zimage_export.build import BuildOptions, build
    from zimage_export.measure.self_check import fixed_inputs
    from zimage_runtime.command_line.progress import Progress
    from zimage_runtime.errors import ExecutorError
    from zimage_runtime.executors.ort.cuda import KIND
    from zimage_runtime.machine.gpus import find_gpu

    try:
        find_gpu()
    except ExecutorError as error:  # said before anything is built
        pytest.skip(str(error))
    if precision == Precision.INT8:  # cuBLAS has no int8 products of the small model's widths
        checkpoint = tmp_path / "wide"
        write_checkpoint(
            checkpoint, few_blocks(small_vae=True), transformer_type=DType.BF16, progress=Progress(quiet=True)
        )
    bundle = build(checkpoint, tmp_path / "bundle", BuildOptions(Precision(precision)), Progress(quiet=True))
    if unavailable := KIND.why_unavailable(bundle, 0):
        pytest.skip(unavailable.reason)
    for program, feeds in fixed_inputs(bundle.manifest.config).items():
        for executor in bundle.manifest.programs[program].keys() & {CUDA, CUDA_WEIGHT_ONLY}:
            ran = where_nodes_ran(bundle.program(program, executor), feeds, tmp_path)
            assert copies(ran) == 0, program
            elsewhere = {n["op_name"] for n in ran if n["provider"] != "CUDAExecutionProvider"}
            assert elsewhere <= SHAPE_ARITHMETIC, program
    shutil.rmtree(tmp_path / "bundle")
