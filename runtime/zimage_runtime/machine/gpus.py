"""NVIDIA GPUs of this machine: which there are, what they can do, and how much of their memory is free.

GPU N is what CUDA calls device N (`cuda_driver`); what is known of it comes from NVML (`nvml`). What changes while an
image is generated is in `gpu_monitor`.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ExecutorError
from .cuda_driver import cuda_devices
from .host_memory import available_memory
from .nvml import NOT_LISTED, Unmeasured, nvml_session, process_memory

BF16_SINCE = (8, 0)
"""The first compute capability that multiplies in bfloat16."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as it was when it was examined."""

    name: str
    capability: tuple[int, int]  # compute capability; 8.0 is the first with bfloat16
    total: int  # bytes of memory
    free: int  # of them at that moment
    cuda: str  # the newest CUDA that its driver supports, "13.0"
    driver: str | None = None  # the driver's own version, "580.65.06"
    index: int = 0  # CUDA's number of it in this process
    uuid: str = ""  # NVML's name of it: "GPU-…", or "MIG-…" for a slice of a partitioned GPU

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bfloat16."""
        return self.capability >= BF16_SINCE

    def used_by(self, pid: int) -> int | Unmeasured:
        """Bytes that a process uses on it now, with its CUDA context."""
        try:
            with nvml_session() as nvml:
                try:
                    handle = nvml.nvmlDeviceGetHandleByUUID(self.uuid)
                except nvml.NVMLError as error:
                    return Unmeasured(f"NVML: {error}")
                return process_memory(nvml, handle, pid)
        except ExecutorError as error:
            return Unmeasured(str(error))

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def list_gpus() -> tuple[Gpu, ...]:
    """All GPUs that CUDA offers to this process, device 0 first; never empty.

    Raises `ExecutorError` that says what is missing: the driver, a GPU, or a driver that works.
    """
    with nvml_session() as nvml:
        try:
            return tuple(_look(nvml, index, uuid) for index, uuid in enumerate(_uuids(nvml)))
        except nvml.NVMLError as error:
            raise ExecutorError(f"the NVIDIA driver does not describe its GPU: {error}") from None


def find_gpu(index: int = 0) -> Gpu:
    """The GPU that CUDA calls device `index`. Raises `ExecutorError` as `list_gpus` does, and for an unknown index."""
    gpus = list_gpus()
    if 0 <= index < len(gpus):
        return gpus[index]
    there = "; ".join(f"{gpu.index} is {gpu.name}" for gpu in gpus)
    raise ExecutorError(f"GPU {index} does not exist; this process can use {len(gpus)}: {there}")


def memory_of_this_process(index: int = 0) -> int | None:
    """Bytes that this process uses on a GPU; None if the driver does not report it or there is no such GPU.

    The CUDA context counts. NVML lists no process that uses nothing, nor this one in a container with process ids of
    its own. Where the ids are the host's, the first must be the case, and the answer is 0.
    """
    try:
        held = find_gpu(index).used_by(os.getpid())
    except ExecutorError:
        return None
    if held == NOT_LISTED and _ids_are_the_hosts():
        return 0
    return None if isinstance(held, Unmeasured) else held


_PROCESS_IDS = Path("/proc/self/ns/pid")
_HOSTS_PROCESS_IDS = "pid:[4026531836]"  # PROC_PID_INIT_INO of the Linux kernel, the same on every machine


def _ids_are_the_hosts() -> bool:
    with suppress(OSError):
        return str(_PROCESS_IDS.readlink()) == _HOSTS_PROCESS_IDS
    return False


def _uuids(nvml: Any) -> Iterator[str]:
    """NVML's names of CUDA's devices: an id that is not a whole GPU's is a slice's."""
    whole = {nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())}
    for device in cuda_devices():
        name = f"GPU-{device}"
        yield name if name in whole else f"MIG-{device}"


def _look(nvml: Any, index: int, uuid: str) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    total, free = _memory(nvml, handle)
    cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())  # 13020 is 13.2
    return Gpu(
        name=nvml.nvmlDeviceGetName(handle),
        capability=_capability(nvml, handle),
        total=total,
        free=free,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        driver=nvml.nvmlSystemGetDriverVersion(),
        index=index,
        uuid=uuid,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Total and free bytes."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:  # a GPU that shares the machine's memory has none of its own (DGX Spark)
        import psutil

        return int(psutil.virtual_memory().total), available_memory()
    return int(memory.total), int(memory.free)


def _capability(nvml: Any, handle: Any) -> tuple[int, int]:
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError_InvalidArgument:  # a slice does not report it: the whole GPU does
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(
            nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        )
    return int(major), int(minor)
