"""Running a CUDA program on the CPU provider, with every fp16 value rounded to fp16.

The CPU provider has few fp16 kernels: it computes in float32 and casts, and takes adjacent casts out again, so that
nothing would be rounded and nothing overflow. An `Identity` behind every node, with graph optimizations off, keeps
the casts apart: each operator's result is then an fp16 value, as on a GPU (which adds up products in float32 too).
"""

import onnx

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CUDA
from zimage_runtime.model.programs import SIGNATURES, Program


def run_cuda_program_on_cpu(
    bundle: Bundle, program: Program, feeds: dict[str, FloatArray], executor: str = CUDA
) -> dict[str, FloatArray]:
    """The outputs of a program that was made for CUDA in fp32 or fp16."""
    import onnxruntime

    path = bundle.program(program, executor)
    model = _with_values_kept_apart(onnx.load(path, load_external_data=False))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = list(SIGNATURES[program].outputs)
    return dict(zip(names, session.run(names, feeds), strict=True))


def _with_values_kept_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    results = {value.name for value in model.graph.output}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name and name not in results:
                node.output[index] = f"{name}/raw"
                nodes.append(
                    onnx.helper.make_node("Identity", [f"{name}/raw"], [name], name=f"{node.name}/{index}/kept")
                )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
