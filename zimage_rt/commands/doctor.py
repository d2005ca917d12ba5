"""`zimage-rt doctor`: what this machine has, and what keeps it from generating.

A check looks at one thing and returns one finding; add it to `CHECKS`. A check that fails to look is itself a
problem that is reported, since broken installations are what this command is for.
"""

import contextlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click


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
    import psutil

    from zimage_runtime.machine.cores import thread_count

    model, features = _processor()
    values = {
        "model": model,
        "cores": psutil.cpu_count(logical=False),
        "threads_used": thread_count(),
        "vector_instructions": features,
    }
    vectors = "vector instructions unknown" if features is None else ", ".join(features) or "no AVX2"
    text = f"{model}, {values['cores'] or 'unknown'} physical cores, {values['threads_used']} threads used, {vectors}"
    return Finding(name, Verdict.OK if features else Verdict.NOTE, text, values)


_VECTOR_FLAGS = {  # as Linux names them in /proc/cpuinfo
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "NEON int8 matrix product",
}
_CPU_INFO = Path("/proc/cpuinfo")


def _processor() -> tuple[str, list[str] | None]:
    """The processor's name and its vector instructions, None where the system does not tell."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features"))  # on x86, on ARM
    features = None if flags is None else [label for flag, label in _VECTOR_FLAGS.items() if flag in flags.split()]
    return fields.get("model name") or _processor_name() or "unknown processor", features


def _processor_name() -> str:
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return platform.processor()


def check_memory(name: str) -> Finding:
    """The machine's memory, and what this process may still take of it."""
    import psutil

    from zimage_runtime.machine.host_memory import available_memory

    total = int(psutil.virtual_memory().total)
    available, limit = available_memory(), _control_group_limit(total)
    text = f"{_gib(total)}, {_gib(available)} available"
    if limit is not None:
        text += f"; the control group allows {_gib(limit)}"
    return Finding(name, Verdict.OK, text, {"total": total, "available": available, "control_group_limit": limit})


_CONTROL_GROUP_LIMITS = (  # of version 2 and 1, as a container sees its own
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def _control_group_limit(total: int) -> int | None:
    for path in _CONTROL_GROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit: the file says "max"
            limit = int(path.read_text())
            return limit if limit < total else None
    return None


def check_disk(name: str) -> Finding:
    """What can be written in the folder that the command runs in."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    return Finding(name, Verdict.OK, f"{_gib(free)} free for the current folder", {"folder": str(folder), "free": free})


_ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def check_packages(name: str) -> Finding:
    """Which ONNX Runtime is installed: the two write into one folder, and what is left then is neither."""
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
        return Finding(name, Verdict.NOTE, "onnxruntime is there, but no package manager knows of it", found)
    return Finding(name, Verdict.PROBLEM, "onnxruntime is not installed; run `pip install onnxruntime`", found)


# MatMul, then RMSNormalization, of opset 23 like a bundle's programs: x [2, 4], w [4, 2], scale [2] → z [2, 2].
# Serialized, because the lean install has no `onnx` to write it with; a test writes it again with `onnx`.
KNOWN_ANSWER_MODEL = (
    b'\x08\n:\x8f\x01\n\x11\n\x01x\n\x01w\x12\x01y"\x06MatMul\n\x1f\n\x01y\n\x05scale\x12\x01z"\x10RMSNormalization'
    b"\x12\x05checkZ\x13\n\x01x\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x02\n\x02\x08\x04"
    b"Z\x13\n\x01w\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x04\n\x02\x08\x02"
    b"Z\x13\n\x05scale\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x02"
    b"b\x13\n\x01z\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x02\n\x02\x08\x02B\x04\n\x00\x10\x17"
)


def check_onnxruntime(name: str) -> Finding:
    """ONNX Runtime loads, and computes a small model of a bundle's own operators right."""
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
    """How many bits an int8 bundle's activations have here, found out by a product with a known answer."""
    from zimage_runtime.machine.int8_products import activation_bits

    bits = activation_bits()
    if bits == 8:
        return Finding(
            name,
            Verdict.OK,
            "integer products are exact: int8 bundles run with 8-bit activations",
            {"activation_bits": bits},
        )
    text = "integer products saturate here (no VNNI): int8 bundles run with 7-bit activations, a little less faithful"
    return Finding(name, Verdict.NOTE, text, {"activation_bits": bits})


def _known_answer(providers: list[str], **options: Any) -> tuple[Any, Any, Any]:
    """What the small model gives, what it should give, and its session."""
    import numpy as np
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4
    session_options.intra_op_num_threads = 1
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    w, scale = x.T.copy(), np.array([1, 2], np.float32)
    product = x @ w
    expected = product / np.sqrt(np.mean(product**2, axis=-1, keepdims=True)) * scale
    session = onnxruntime.InferenceSession(KNOWN_ANSWER_MODEL, session_options, providers=providers, **options)
    return session.run(["z"], {"x": x, "w": w, "scale": scale})[0], expected, session


def _is_right(answer: Any, expected: Any) -> bool:
    import numpy as np

    return bool(np.allclose(answer, expected, rtol=1e-4))


def check_nvidia(name: str) -> Finding:
    """The GPU and its driver, and whether the ONNX Runtime that is installed computes on it."""
    from zimage_runtime.errors import ExecutorError
    from zimage_runtime.executors.choose import why_no_package
    from zimage_runtime.machine.gpus import find_gpu

    try:
        gpu = find_gpu()
    except ExecutorError as error:
        return Finding(name, Verdict.OK, f"{error}; images are generated on the CPU", {"gpu": None})
    free = "unknown" if gpu.free is None else _gib(gpu.free)
    text = f"{gpu}, {_gib(gpu.total)}, {free} free, driver for CUDA {gpu.driver}"
    values = {"gpu": gpu.name, "capability": list(gpu.capability), "total": gpu.total, "free": gpu.free}
    if reason := why_no_package():
        return Finding(name, Verdict.NOTE, f"{text}; {reason}", values)
    if reason := _cuda_fault():
        return Finding(name, Verdict.PROBLEM, f"{text}; {reason}", values)
    return Finding(name, Verdict.OK, f"{text}; computes a known answer right", values)


def _cuda_fault() -> str | None:
    """What keeps ONNX Runtime from computing on the GPU: the known answer again, there."""
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
    """What the tensorrt executor needs, and what of it is here: driver, GPU, packages."""
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
        text = f"{installed}, but no NVIDIA driver with a GPU: engines can be built here, and run where there is one"
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
    """Whether zimage-export can work here. Its packages are looked for, never imported: they take seconds."""
    found = {package: _installed(package) if find_spec(package) else None for package in _EXPORT_PACKAGES}
    missing = [package for package in _EXPORT_PACKAGES if find_spec(package) is None]
    if not missing:
        return Finding(
            name, Verdict.OK, ", ".join(f"{key} {value or ''}".strip() for key, value in found.items()), found
        )
    text = (
        f"{', '.join(missing)} not installed; `pip install 'zimage-rt[export]'` if checkpoints are to be exported here"
    )
    return Finding(name, Verdict.NOTE, text, found)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


CHECKS: dict[str, Callable[[str], Finding]] = {
    "zimage-rt": check_versions,
    "processor": check_processor,
    "memory": check_memory,
    "disk": check_disk,
    "packages": check_packages,
    "onnxruntime": check_onnxruntime,
    "int8": check_int8,
    "nvidia": check_nvidia,
    "tensorrt": check_tensorrt,
    "export": check_export,
}
"""By the name that is printed, in that order."""
