"""`zimage-rt doctor`: what this machine has, and what keeps it from generating.

A check looks at one thing and returns one finding; add it to `CHECKS`. A check that cannot look is a problem of its
own, since broken installations are what this command is for. Executors examine themselves.
"""

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.executors.examination import Verdict
from zimage_runtime.executors.registry import EXECUTORS, executor_kind
from zimage_runtime.units import gib

if TYPE_CHECKING:
    from zimage_runtime.machine.gpus import Gpu


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
    text = f"{gib(total)}, {gib(available)} available"
    if limit is not None:
        text += f"; the control group allows {gib(limit)}"
    return Finding(name, Verdict.OK, text, {"total": total, "available": available, "control_group_limit": limit})


def check_disk(name: str) -> Finding:
    """Free space in the folder that the command runs in."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    return Finding(name, Verdict.OK, f"{gib(free)} free for the current folder", {"folder": str(folder), "free": free})


_ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def check_packages(name: str) -> Finding:
    """Which ONNX Runtime is installed. Both kinds write into one folder, where one damages the other."""
    from zimage_runtime.executors.ort.cuda_package import SWAP_TO_CPU, SWAP_TO_GPU

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

        from zimage_runtime.executors.ort.known_answer import is_right, known_answer
    except Exception as error:  # a missing system library is an ImportError, a damaged one may be anything
        return Finding(name, Verdict.PROBLEM, f"cannot be loaded ({_reason(error)}); {remedy}")
    providers = onnxruntime.get_available_providers()
    values = {"version": onnxruntime.__version__, "providers": providers}
    try:
        answer, _ = known_answer(["CPUExecutionProvider"])
    except Exception as error:
        text = f"{values['version']} cannot run a bundle's operators ({_reason(error)}); {remedy}"
        return Finding(name, Verdict.PROBLEM, text, values)
    if not is_right(answer):
        return Finding(name, Verdict.PROBLEM, f"{values['version']} computes wrong numbers; {remedy}", values)
    text = f"{values['version']} computes a known answer right; providers: {', '.join(providers)}"
    return Finding(name, Verdict.OK, text, values)


def check_gpus(name: str) -> Finding:
    """The NVIDIA GPUs that this process can use, as CUDA numbers them, and their driver."""
    from zimage_runtime.errors import ExecutorError
    from zimage_runtime.machine.cuda_versions import why_old_driver
    from zimage_runtime.machine.gpus import list_gpus

    try:
        gpus = list_gpus()
    except ExecutorError as error:
        return Finding(name, Verdict.OK, f"Using the CPU ({error})", {"gpus": [], "driver": None, "cuda": None})
    listed = "; ".join(_gpu_text(gpu, numbered=len(gpus) > 1) for gpu in gpus)
    driver, cuda = gpus[0].driver, gpus[0].cuda  # the same for all
    values = {"gpus": [_gpu_values(gpu) for gpu in gpus], "driver": driver, "cuda": cuda}
    text = f"{listed}; driver {driver or 'unknown'} for CUDA {cuda}"
    old = [why_old_driver(gpus[0], needed, package) for package, needed in _cuda_packages().items()]
    reasons = [reason for reason in old if reason]
    return Finding(name, Verdict.NOTE if reasons else Verdict.OK, "; ".join([text, *reasons]), values)


def _cuda_packages() -> dict[str, int]:
    """The packages here that need a driver for CUDA, and its major version for each."""
    from zimage_runtime.executors.ort.cuda_package import built_for_cuda

    found: dict[str, int] = {}
    if (number := _installed("onnxruntime-gpu")) and (needed := built_for_cuda()):
        found[f"onnxruntime-gpu {number}"] = needed
    if number := _installed("cuda-bindings"):  # numbered after the CUDA that it binds
        found[f"cuda-bindings {number}"] = int(number.split(".")[0])
    return found


def _gpu_text(gpu: "Gpu", *, numbered: bool) -> str:
    number = f"GPU {gpu.index}: " if numbered else ""
    return f"{number}{gpu}, {gib(gpu.total)}, {gib(gpu.free)} free"


def _gpu_values(gpu: "Gpu") -> dict[str, Any]:
    """Without the GPU's serial id: reports are posted in public."""
    capability = list(gpu.capability)
    return {"index": gpu.index, "name": gpu.name, "capability": capability, "total": gpu.total, "free": gpu.free}


def check_executor(name: str) -> Finding:
    """What an executor says of itself on this machine."""
    examined = executor_kind(name).examine()
    return Finding(name, examined.verdict, examined.text, examined.values)


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


CHECKS: dict[str, Callable[[str], Finding]] = {
    "zimage-rt": check_versions,
    "processor": check_processor,
    "memory": check_memory,
    "disk": check_disk,
    "packages": check_packages,
    "onnxruntime": check_onnxruntime,
    "gpu": check_gpus,
    **dict.fromkeys(reversed([*EXECUTORS]), check_executor),
    "export": check_export,
}
"""By the name that is printed, in that order."""
