"""Every node of the programs for CUDA has a kernel there in the types that it is given, and no value has to be copied
between host and device in mid-program.

Without a GPU this reads ONNX Runtime's own table of kernels; where there is one, the test at the end runs the
programs and looks where each node ran. (`benchmarks/gpu_cuda.py` does the same and reports it.)
"""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from cuda_kernels import KERNELS, SHAPE_ARITHMETIC, SHAPE_INPUTS
from onnx import TensorProto

from zimage_export.graphs import Target, build_graphs
from zimage_export.precision import StoragePolicy
from zimage_export.synthetic import SMALL
from zimage_runtime.contracts import Program
from zimage_runtime.manifest import CUDA, Precision
from zimage_runtime.tensors import DType, TensorEntry


def programs(precision: Precision) -> dict[Program, onnx.ModelProto]:
    """The programs for CUDA of a precision, without weights, with the type of every value."""
    policy = StoragePolicy(precision, DType.BF16)
    models = {}
    for graph in build_graphs(SMALL.config, Target(CUDA, policy)):
        if graph.program is Program.MODULATION:
            continue
        entries = {
            name: TensorEntry(policy.storage(graph.program.component, name, shape).value, shape, 0, 0)
            for name, shape in graph.weights.items()
        }
        model = graph.to_model("weights.safetensors", entries)
        models[graph.program] = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return models


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}


def misplaced(model: onnx.ModelProto) -> list[str]:
    """What would not run on CUDA, or would need a copy between host and device."""
    types, faults = types_of(model), []
    constants = {tensor.name for tensor in model.graph.initializer}
    on_host: set[str] = set()  # shapes, and what is computed of them
    for node in model.graph.node:
        where = f"{node.name} ({node.op_type})"
        if node.domain:
            faults.append(f"{where} is no standard operator")
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
        allowed = KERNELS.get(node.op_type, set())
        first = types[data[0]]
        if first not in allowed:
            faults.append(f"{where} has no kernel for {TensorProto.DataType.Name(first)}")
    return faults


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
def test_every_node_has_a_kernel_on_cuda(precision: Precision) -> None:
    for program, model in programs(precision).items():
        assert misplaced(model) == [], program


def test_the_check_finds_what_does_not_run() -> None:
    models = programs(Precision.BF16)
    decoder = models[Program.DECODER]
    for node in decoder.graph.node:
        if node.op_type == "Expand":  # as it was before: there is no Resize in bfloat16
            node.op_type = "Resize"
    assert any("Resize) has no kernel for BFLOAT16" in fault for fault in misplaced(decoder))
    denoiser = models[Program.DENOISER]
    (slice_node,) = [node for node in denoiser.graph.node if node.op_type == "Slice"]
    slice_node.input[2] = next(node.output[0] for node in denoiser.graph.node if node.op_type == "Cast")
    assert any("Slice) reads" in fault for fault in misplaced(denoiser))
    reshape = next(node for node in denoiser.graph.node if node.op_type == "Reshape")
    reshape.op_type = "Gather"
    assert misplaced(denoiser)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_node_runs_on_cuda(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    from zimage_export.build import BuildOptions, build
    from zimage_export.selfcheck import fixed_inputs
    from zimage_runtime.choice import cuda_obstacle
    from zimage_runtime.progress import Progress

    bundle = build(checkpoint, tmp_path / "bundle", BuildOptions(Precision(precision)), Progress(quiet=True))
    if reason := cuda_obstacle(bundle):
        pytest.skip(reason)
    for program, feeds in fixed_inputs(bundle.manifest.config).items():
        if program is not Program.MODULATION:
            ran = where_nodes_ran(bundle.program(program, CUDA), feeds, tmp_path)
            assert not [node for node in ran if node["op_name"].startswith("Memcpy")], program
            elsewhere = {n["op_name"] for n in ran if n["provider"] != "CUDAExecutionProvider"}
            assert elsewhere <= SHAPE_ARITHMETIC, program
    shutil.rmtree(tmp_path / "bundle")


def where_nodes_ran(path: Path, feeds: Any, folder: Path) -> list[dict[str, Any]]:
    """The nodes of one run, by ONNX Runtime's profiler."""
    import onnxruntime

    from zimage_runtime.ort_cuda import PROVIDER, preload_libraries

    preload_libraries()
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(
        str(path), options, providers=[PROVIDER, "CPUExecutionProvider"], enable_fallback=0
    )
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
