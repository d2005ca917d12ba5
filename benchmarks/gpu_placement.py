"""Where ONNX Runtime ran each node of a program, by its profiler, which sees copies between host and device too."""

import json
from pathlib import Path
from typing import Any

SHAPE_ARITHMETIC = {"Concat", "Div", "Gather", "Mul", "Shape", "Slice", "Sub", "Unsqueeze", "Add"}
"""What is done with shapes, which ONNX Runtime leaves on the host: ``GetCpuPreferredNodes``."""


def where_nodes_ran(path: Path, feeds: Any, folder: Path, *, on_gpu: bool = True) -> list[dict[str, Any]]:
    """The nodes of one run of a program for CUDA, each with its operator and its provider. Profiles go to `folder`."""
    import onnxruntime

    from zimage_runtime.executors.ort.cuda import DISABLED_OPTIMIZERS, PROVIDER, preload_libraries

    if on_gpu:
        preload_libraries()
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / f"profile-{path.stem}")
    session = onnxruntime.InferenceSession(
        str(path),
        options,
        providers=[*([PROVIDER] if on_gpu else []), "CPUExecutionProvider"],
        enable_fallback=0,
        disabled_optimizers=DISABLED_OPTIMIZERS,
    )
    session.run(None, feeds)
    profile = Path(session.end_profiling())
    events = json.loads(profile.read_text())
    profile.unlink()
    return [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]


def copies(nodes: list[dict[str, Any]]) -> int:
    """How often values went between host and device in mid-program."""
    return sum(node["op_name"].startswith("Memcpy") for node in nodes)


def child_placement(options: dict[str, Any]) -> dict[str, Any]:
    """Where each node of a reduced model's programs ran."""
    from zimage_export.measure.self_check import fixed_inputs
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.manifest import CUDA
    from zimage_runtime.model.programs import Program

    bundle, on_gpu = Bundle.open(options["bundle"]), options["executor"] == "cuda"
    wanted = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    result: dict[str, Any] = {}
    for program, feeds in fixed_inputs(bundle.manifest.config).items():
        if program is Program.MODULATION:
            continue
        name = (options["denoiser"] if program is Program.DENOISER else None) or CUDA
        nodes = where_nodes_ran(bundle.program(program, name), feeds, bundle.root.parent, on_gpu=on_gpu)
        elsewhere = sorted({node["op_name"] for node in nodes if node["provider"] != wanted})
        result[program.value] = {
            "nodes": len(nodes),
            "on_device": sum(node["provider"] == wanted for node in nodes),
            "elsewhere": elsewhere,
            "copies": copies(nodes),
            "as_it_should_be": set(elsewhere) <= SHAPE_ARITHMETIC and not copies(nodes),
        }
    return result
