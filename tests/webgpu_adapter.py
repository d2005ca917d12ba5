"""ONNX Runtime's WebGPU provider in tests, on a software Vulkan driver where there is no GPU.

Needs the package ``onnxruntime-ep-webgpu`` and a Vulkan driver that it accepts, such as Mesa's lavapipe from version 23
on. Where either is missing a test is skipped with the reason, and fails if the environment says `CI=true`.
"""

import functools
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from zimage_runtime.arrays import FloatArray
from zimage_runtime.model.programs import Program

PLUGIN = "onnxruntime_ep_webgpu"
SOFTWARE = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"

NOT_FOLDED = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer", "QDQSelectorActionTransformer"]
"""Optimizations that would widen all weights at load; on the CPU, the last one would also quantize activations."""


@functools.cache
def adapters() -> tuple[list[Any], str]:
    """The one device that WebGPU offers, or none and why."""
    if find_spec(PLUGIN) is None:
        return [], "onnxruntime-ep-webgpu is not installed"
    os.environ.setdefault(SOFTWARE, "1")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime
    import onnxruntime_ep_webgpu

    name = onnxruntime_ep_webgpu.get_ep_name()
    if all(device.ep_name != name for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library("webgpu", onnxruntime_ep_webgpu.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name][:1]
    return found, "" if found else "no adapter: WebGPU finds no Vulkan driver that it accepts"


def require_adapter() -> None:
    """Skips a test that has no adapter to run on, or fails it in CI."""
    found, why = adapters()
    if not found and os.environ.get("CI") == "true":
        pytest.fail(why)
    if not found:
        pytest.skip(why)


def folded(program: Program) -> list[str]:
    """The optimizations to leave out: the autoencoder's bfloat16 weights must be widened at load."""
    return NOT_FOLDED[2:] if program.component == "vae" else NOT_FOLDED


def run_on_adapter(
    path: Path, program: Program, feeds: Mapping[str, FloatArray], folder: Path
) -> tuple[dict[str, FloatArray], list[dict[str, Any]]]:
    """A program's outputs on the adapter, and what ONNX Runtime's profiler says of each node that ran."""
    import onnxruntime

    options = _options()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.add_provider_for_devices(adapters()[0], {})
    session = onnxruntime.InferenceSession(str(path), options, disabled_optimizers=folded(program))
    outputs = session.run(None, dict(feeds))
    nodes = profiled(Path(session.end_profiling()))
    return dict(zip((output.name for output in session.get_outputs()), outputs, strict=True)), nodes


def run_on_cpu(path: Path, program: Program, feeds: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The outputs of the same program, with the same optimizations, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path), _options(), providers=["CPUExecutionProvider"], disabled_optimizers=folded(program)
    )
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, dict(feeds)), strict=True))


def profiled(path: Path) -> list[dict[str, Any]]:
    """The nodes in a profile: `op_name`, `provider` and the shapes of each."""
    events = json.loads(path.read_text("utf-8"))
    return [event["args"] | {"name": event["name"]} for event in events if event["name"].endswith("_kernel_time")]


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options
