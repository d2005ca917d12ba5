"""NVML, the management library that comes with NVIDIA's driver, through the ``nvidia-ml-py`` package (``pynvml``).

A value that NVML does not report is `Unmeasured` with the reason, never 0. NVML lists processes by the ids of the host:
in a container with ids of its own, this process is not found. On Windows (WDDM) the system owns the memory, and NVML
reports no process's share. Source: NVIDIA's NVML API reference.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ..errors import ExecutorError
from .cuda_driver import has_cuda_library


@dataclass(frozen=True)
class Unmeasured:
    """The reason why there is no value."""

    reason: str


NOT_LISTED = Unmeasured(
    "NVML does not list the process: it has allocated nothing, or this is a container with process ids of its own "
    "(`docker run --pid=host` shows it)"
)
_WINDOWS = Unmeasured("Windows (WDDM) does not report a process's GPU memory")
_NO_SHARE = Unmeasured("NVML does not report the process's memory on this GPU")


@contextmanager
def nvml_session() -> Iterator[Any]:
    """The ``pynvml`` module, initialized. NVML counts how often, so that sessions may nest; only the first is slow.

    Raises `ExecutorError` that says what is missing.
    """
    try:
        import pynvml
    except ImportError:
        raise ExecutorError("nvidia-ml-py is not installed; run `pip install nvidia-ml-py`") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        raise ExecutorError(_NO_MANAGEMENT if has_cuda_library() else "no NVIDIA driver found") from None
    except pynvml.NVMLError_DriverNotLoaded:
        raise ExecutorError("the NVIDIA driver is installed but not loaded; restart, or reinstall it") from None
    except pynvml.NVMLError as error:
        raise ExecutorError(f"the NVIDIA driver does not work: {error}; reinstall it or restart") from None
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


_NO_MANAGEMENT = (
    "the NVIDIA driver's management library (NVML) was not found; "
    "a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
)


def process_memory(nvml: Any, handle: Any, pid: int) -> int | Unmeasured:
    """Bytes that a process uses on the GPU of a handle, with its CUDA context."""
    found: list[int | None] = []
    try:
        for listing in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            found += [process.usedGpuMemory for process in listing(handle) if process.pid == pid]
    except nvml.NVMLError as error:
        return Unmeasured(f"NVML: {error}")
    if not found:
        return NOT_LISTED
    known = [value for value in found if value is not None]  # None stands for NVML_VALUE_NOT_AVAILABLE
    if not known:
        return _WINDOWS if os.name == "nt" else _NO_SHARE
    return max(known)  # a process in both lists is the same memory twice
