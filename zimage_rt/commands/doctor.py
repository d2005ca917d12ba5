"""`zimage-rt doctor`: what this machine has, and what keeps it from generating.

A check looks at one thing and returns one finding; add it to `CHECKS`. A check that cannot look is a problem of its
own, since broken installations are what this command is for. `EXECUTOR_CHECKS` are those of the executors on a GPU.
"""

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from zimage_runtime.machine.gpus import Gpu


class Verdict(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # worth knowing; images can be generated
    PROBLEM = "problem"  # something is broken, and the text says what to do


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    verdict: Verdict
    text: str  # one line
    values: Mapping[str, Any] = field(default_factory=dict)  # the same for programs, JSON's own types


@click.command(short_help="Show what this machine has and what is wrong with it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Show what this machine has, a line each, and exit with 1 if there is a problem."""
    findings = [_look(name, check) for name, check in CHECKS.items()]
    healthy = all(finding.verdict is not Verdict.PROBLEM for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": healthy, "checks": [vars(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.verdict.value:<8} {finding.name:<12} {finding.text}")
    if not healthy:
        context.exit(1)


def _look(name: str, check: Callable[[str], Finding]) -> Finding:
    try:
        return check(name)
    except Exception as error:  # whatever a broken library raises
        return Finding(name, Verdict.PROBLEM, f"cannot be examined: {type(error).__name__}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def check_versions(name: str) -> Finding:
    """The package, the interpreter and the system."""
    values = {
        "zimage_rt": _installed("zimage-rt"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }
    text = f"{values['zimage_rt']} on Python {values['python']}, {values['system']}, {values['machine']}"
    return Finding(name, Verdict.OK, text, values)


def _installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_processor(name: str) -> Finding:
    """The processor, the threads that are used, and the vector instructions that decide its speed."""
    from zimage_runtime.machine.cores import thread_count
    from zimage_runtime.machine.processor import find_processor, vector_text

    processor = find_processor()
    cores, vectors = processor.physical_cores, processor.vector_instructions
    values = {
        "model": processor.name,
        "cores": cores,
        "threads_used": thread_count(),
        "vector_instructions": None if vectors is None else list(vectors),
    }
    text = (
        f"{processor.name}, {cores or 'unknown'} physical cores, {values['threads_used']} threads used, "
        f"{vector_text(vectors)}"
    )
    return Finding(name, Verdict.OK if vectors else Verdict.NOTE, text, values)


def check_memory(name: str) -> Finding:
    """The machine's memory, and how much of it this process may still take."""
    import psutil

    from zimage_runtime.machine.host_memory import available_memory, control_group_limit

    total = int(psutil.virtual_memory().total)
    available, limit = available_memory(), control_group_limit()
    text = f"{_gib(total)}, {_gib(available)} available"
    if limit is not None:
        text += f"; the control group allows {_gib(limit)}"
    return Finding(name, Verdict.OK, text, {"total": total, "available": available, "control_group_limit": limit})


def check_disk(name: str) -> Finding:
    """Free space in the folder that the command runs in."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    return Finding(name, Verdict.OK, f"{_gib(free)} free for the current folder", {"folder": str(folder), "free": free})


_ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def check_packages(name: str) -> Finding:
    """Which ONNX Runtime is installed. Both kinds write into one folder, where one damages the other."""
    from zimage_runtime.executors.choose import SWAP_TO_CPU, SWAP_TO_GPU

    found = {package: number for package in _ONNX_RUNTIMES if (number := _installed(package))}
    listed = " and ".join(f"{package} {number}" for package, number in found.items())
    if len(found) > 1:
        text = (
            f"{listed} overwrite each other's files; run `{SWAP_TO_GPU[0]}`, then `{SWAP_TO_GPU[1]}` for an NVIDIA GPU "
            f"or `{SWAP_TO_CPU[1]}` for the CPU alone"
        )
        return Finding(name, Verdict.PROBLEM, text, found)
    if found:
        return Finding(name, Verdict.OK, listed, found)
    if find_spec("onnxruntime"):
        return Finding(name, Verdict.NOTE, "onnxruntime can be imported, but was not installed as a package", found)
    return Finding(name, Verdict.PROBLEM, "onnxruntime is not installed; run `pip install onnxruntime`", found)


def check_onnxruntime(name: str) -> Finding:
    """Whether ONNX Runtime loads, and computes a small model of a bundle's operators right."""
    package = next((package for package in _ONNX_RUNTIMES if _installed(package)), _ONNX_RUNTIMES[0])
    remedy = f"run `pip install --upgrade --force-reinstall {package}`"
    try:
        import onnxruntime
    except Exception as error:  # a missing system library is an ImportError, a damaged one may be anything
        return Finding(name, Verdict.PROBLEM, f"cannot be loaded ({_reason(error)}); {remedy}")
    providers = onnxruntime.get_available_providers()
    values = {"version": onnxruntime.__version__, "providers": providers}
    try:
        answer, expected, _ = _known_answer(["CPUExecutionProvider"])
    except Exception as error:
        text = f"{values['version']} cannot run a bundle's operators ({_reason(error)}); {remedy}"
        return Finding(name, Verdict.PROBLEM, text, values)
    if not _is_right(answer, expected):
        return Finding(name, Verdict.PROBLEM, f"{values['version']} computes wrong numbers; {remedy}", values)
    text = f"{values['version']} computes a known answer right; providers: {', '.join(providers)}"
    return Finding(name, Verdict.OK, text, values)


def check_int8(name: str) -> Finding:
    """How many bits the activations of an int8 bundle have here, decided by a product with a known answer."""
    from zimage_runtime.machine.int8_products import activation_bits

    bits = activation_bits()
    if bits == 8:
        return Finding(
            name,
            Verdict.OK,
            "integer products are exact: int8 bundles run with 8-bit activations",
            {"activation_bits": bits},
        )
    text = "integer products saturate here (no VNNI): int8 bundles run with 7-bit activations, slightly less accurate"
    return Finding(name, Verdict.NOTE, text, {"activation_bits": bits})


def known_answer_model() -> bytes:
    """z = RMSNormalization(x w), of the operator set of a bundle's programs."""
    from zimage_runtime.machine.tiny_onnx import Element, Node, Value, onnx_model

    def floats(*shape: int) -> Value:
        return Value(Element.FLOAT, shape)

    return onnx_model(
        [Node("MatMul", "x w", "y"), Node("RMSNormalization", "y scale", "z")],
        {"x": floats(2, 4), "w": floats(4, 2), "scale": floats(2)},
        {"z": floats(2, 2)},
        opset=23,
    )


def _known_answer(providers: list[str], **options: Any) -> tuple[Any, Any, Any]:
    """The small model's answer, the right one, and the session that computed it."""
    import numpy as np
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4
    session_options.intra_op_num_threads = 1
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    w, scale = x.T.copy(), np.array([1, 2], np.float32)
    product = x @ w
    expected = product / np.sqrt(np.mean(product**2, axis=-1, keepdims=True)) * scale
    session = onnxruntime.InferenceSession(known_answer_model(), session_options, providers=providers, **options)
    return session.run(["z"], {"x": x, "w": w, "scale": scale})[0], expected, session


def _is_right(answer: Any, expected: Any) -> bool:
    import numpy as np

    return bool(np.allclose(answer, expected, rtol=1e-4))


def check_gpus(name: str) -> Finding:
    """The NVIDIA GPUs that this process can use, as CUDA numbers them, and their driver."""
    from zimage_runtime.errors import ExecutorError
    from zimage_runtime.machine.gpus import list_gpus

    try:
        gpus = list_gpus()
    except ExecutorError as error:
        return Finding(name, Verdict.OK, f"Using the CPU ({error})", {"gpus": [], "driver": None, "cuda": None})
    listed = "; ".join(_gpu_text(gpu, numbered=len(gpus) > 1) for gpu in gpus)
    driver, cuda = gpus[0].driver, gpus[0].cuda  # the same for all
    values = {"gpus": [_gpu_values(gpu) for gpu in gpus], "driver": driver, "cuda": cuda}
    return Finding(name, Verdict.OK, f"{listed}; driver {driver or 'unknown'} for CUDA {cuda}", values)


def _gpu_text(gpu: "Gpu", *, numbered: bool) -> str:
    number = f"GPU {gpu.index}: " if numbered else ""
    return f"{number}{gpu}, {_gib(gpu.total)}, {_gib(gpu.free)} free"


def _gpu_values(gpu: "Gpu") -> dict[str, Any]:
    """Without the GPU's serial id: reports are posted in public."""
    capability = list(gpu.capability)
    return {"index": gpu.index, "name": gpu.name, "capability": capability, "total": gpu.total, "free": gpu.free}


def check_cuda(name: str) -> Finding:
    """Whether the ONNX Runtime that is installed computes on the GPU."""
    from zimage_runtime.errors import ExecutorError
    from zimage_runtime.executors.choose import why_no_package
    from zimage_runtime.machine.gpus import find_gpu

    try:
        gpu = find_gpu()
    except ExecutorError as error:
        return Finding(name, Verdict.OK, f"not used ({error})", {"gpu": None})
    values = {"gpu": gpu.name}
    if reason := why_no_package():
        return Finding(name, Verdict.NOTE, reason, values)
    if reason := _cuda_fault():
        return Finding(name, Verdict.PROBLEM, reason, values)
    return Finding(name, Verdict.OK, f"{gpu.name} computes a known answer right", values)


def _cuda_fault() -> str | None:
    """What keeps ONNX Runtime from computing the known answer on the GPU."""
    import onnxruntime

    from zimage_runtime.executors.choose import SWAP_TO_GPU
    from zimage_runtime.executors.ort.device import PROVIDER, preload_libraries

    complaint = preload_libraries()
    remedy = f"run `{SWAP_TO_GPU[0]}`, then `{SWAP_TO_GPU[1]}`"
    try:
        answer, expected, session = _known_answer([PROVIDER], enable_fallback=0)
    except Exception as error:  # whatever a broken library raises
        return f"ONNX Runtime {onnxruntime.__version__} cannot compute on it ({_reason(error)}); {remedy}"
    if PROVIDER not in session.get_providers():
        what = complaint[:200] or "a library of CUDA or cuDNN is missing or of another version"
        return f"ONNX Runtime {onnxruntime.__version__} cannot start CUDA ({what}); {remedy}"
    return None if _is_right(answer, expected) else f"ONNX Runtime computes wrong numbers on it; {remedy}"


def check_tensorrt(name: str) -> Finding:
    """What the tensorrt executor needs and what of it is installed: driver, GPU, packages."""
    from zimage_runtime.errors import ZImageRuntimeError
    from zimage_runtime.executors.tensorrt.cuda import CudaDevice
    from zimage_runtime.executors.tensorrt.trt_api import FULL, RTX
    from zimage_runtime.machine.gpu_targets import OLDEST, gpu_of, variant_of

    library = next((package for package in (RTX, FULL) if find_spec(package)), None)
    bindings = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    values: dict[str, Any] = {
        "library": library,
        "version": _installed(library) if library else None,
        "bindings": _installed("cuda-bindings"),
        "gpu": None,
        "capability": None,
    }
    missing = [package for package, here in ((RTX, library), ("cuda-bindings", bindings)) if not here]
    if missing:
        text = f"{' and '.join(missing)} not installed; `pip install 'zimage-rt[tensorrt]'` if there is an NVIDIA GPU"
        return Finding(name, Verdict.NOTE, text, values)
    installed = f"{library} {values['version']}"
    try:
        device = CudaDevice()
    except ZImageRuntimeError:
        text = f"{installed}, but no NVIDIA driver with a GPU: engines can be built here, not run"
        return Finding(name, Verdict.NOTE, text, values)
    capability = device.capability
    values |= {"gpu": device.name, "capability": list(capability)}
    if capability < OLDEST:
        text = f"{installed}; {device.name} is older than TensorRT serves (7.5): use --executor cpu"
        return Finding(name, Verdict.NOTE, text, values)
    target = gpu_of(capability)
    text = (
        f"{installed}; {device.name}, {target} ({target.label}): runs bundles that `zimage-export engines` was run on, "
        f"their {variant_of(capability)} programs"
    )
    return Finding(name, Verdict.OK, text, values)


_EXPORT_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "safetensors")


def check_export(name: str) -> Finding:
    """Whether zimage-export can work here. Its packages are searched for, not imported: that takes seconds."""
    found = {package: _installed(package) if find_spec(package) else None for package in _EXPORT_PACKAGES}
    missing = [package for package in _EXPORT_PACKAGES if find_spec(package) is None]
    if not missing:
        return Finding(
            name, Verdict.OK, ", ".join(f"{key} {value or ''}".strip() for key, value in found.items()), found
        )
    text = f"{', '.join(missing)} not installed; run `pip install 'zimage-rt[export]'` to export checkpoints here"
    return Finding(name, Verdict.NOTE, text, found)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


EXECUTOR_CHECKS: dict[str, Callable[[str], Finding]] = {"cuda": check_cuda, "tensorrt": check_tensorrt}

CHECKS: dict[str, Callable[[str], Finding]] = {
    "zimage-rt": check_versions,
    "processor": check_processor,
    "memory": check_memory,
    "disk": check_disk,
    "packages": check_packages,
    "onnxruntime": check_onnxruntime,
    "int8": check_int8,
    "gpu": check_gpus,
    **EXECUTOR_CHECKS,
    "export": check_export,
}
"""By the name that is printed, in that order."""
