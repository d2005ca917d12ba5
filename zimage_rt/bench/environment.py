"""What a measurement ran on: processor, memory, system, versions, commit, GPU. Nothing that identifies the machine."""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zimage_runtime.machine.cores import thread_count
from zimage_runtime.machine.gpu_monitor import GpuMonitor
from zimage_runtime.machine.nvml import Unmeasured
from zimage_runtime.machine.processor import find_processor, vector_text

PACKAGES = ("zimage-rt", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy", "pillow", "tokenizers")


def environment(gpu: GpuMonitor | Unmeasured, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """What a row of results records of its machine, in JSON's types; None for what is not installed or not known."""
    return {
        **machine(*packages),
        "release": platform.release(),
        "threads": thread_count(),
        "git_commit": git_commit(),
        "gpu": {"none": gpu.reason} if isinstance(gpu, Unmeasured) else gpu.description(),
    }


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory and the versions of packages."""
    import psutil

    processor = find_processor()
    vectors = processor.vector_instructions
    return {
        "cpu": processor.name,
        "physical_cores": processor.physical_cores,
        "vector_instructions": None if vectors is None else list(vectors),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def describe(description: Mapping[str, Any]) -> str:
    """The machine in one line of text."""
    packages = ", ".join(f"{name} {number}" for name, number in description["packages"].items() if number)
    return (
        f"{description['cpu']}, {description['physical_cores']} cores "
        f"({vector_text(description['vector_instructions'])}), {description['memory_gib']} GiB, "
        f"{description['system']}, Python {description['python']}, {packages}"
    )


def setup(description: Mapping[str, Any]) -> str:
    """What must be the same for an earlier row to stand for a new measurement."""
    names = ("cpu", "physical_cores", "memory_gib", "packages", "git_commit", "gpu", "threads")
    return repr([description.get(name) for name in names])


def conditions() -> dict[str, Any]:
    """What may disturb a measurement, now: the load of the last minute, the clock. None for what the system hides."""
    import psutil

    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return {
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpu_clock_mhz": frequency.current if frequency else None,
        "memory_available_bytes": int(psutil.virtual_memory().available),
    }


def git_commit() -> str | None:
    """The commit of the checkout that the package is imported from, with "+changes" where its code differs from it."""
    folder = Path(__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)  # or the repository is somebody else's
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/zimage_rt", ":/runtime")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
