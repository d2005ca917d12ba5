"""The NVIDIA GPU of this machine, asked of its driver, which is all that this needs: no package, no CUDA toolkit.

Names and numbers of the calls: CUDA driver API (``cuda.h``) and NVML (``nvml.h``).
"""

import ctypes
import os
from dataclasses import dataclass
from typing import Any

from ..errors import ExecutorError

_WINDOWS = os.name == "nt"
_CUDA_LIBRARY = "nvcuda.dll" if _WINDOWS else "libcuda.so.1"
_NVML_LIBRARY = "nvml.dll" if _WINDOWS else "libnvidia-ml.so.1"

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_TEXT = 128


@dataclass(frozen=True)
class Gpu:
    """The GPU that executors use: the first that ``CUDA_VISIBLE_DEVICES`` leaves."""

    name: str
    capability: tuple[int, int]  # compute capability; 8.0 is the first with bfloat16
    total: int  # bytes of memory
    free: int | None  # of them now; None where the driver does not tell
    driver: str  # the newest CUDA that it serves, "13.0"

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bfloat16."""
        return self.capability >= (8, 0)

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def find_gpu() -> Gpu:
    """Raises `ExecutorError` that says what is missing: the driver, a GPU, or a driver that works."""
    try:
        cuda = _load(_CUDA_LIBRARY)
    except OSError:
        raise ExecutorError(f"no NVIDIA driver is installed ({_CUDA_LIBRARY} is not there)") from None
    status = cuda.cuInit(0)
    if status == _NO_DEVICE:
        raise ExecutorError("the NVIDIA driver finds no GPU")
    _check(cuda, status)
    count, device = ctypes.c_int(), ctypes.c_int()
    _check(cuda, cuda.cuDeviceGetCount(ctypes.byref(count)))
    if not count.value:
        raise ExecutorError("the NVIDIA driver finds no GPU")
    _check(cuda, cuda.cuDeviceGet(ctypes.byref(device), 0))
    name, bus, total = ctypes.create_string_buffer(_TEXT), ctypes.create_string_buffer(_TEXT), ctypes.c_size_t()
    _check(cuda, cuda.cuDeviceGetName(name, _TEXT, device))
    _check(cuda, cuda.cuDeviceGetPCIBusId(bus, _TEXT, device))
    _check(cuda, cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device))
    version = ctypes.c_int()
    _check(cuda, cuda.cuDriverGetVersion(ctypes.byref(version)))
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=(_attribute(cuda, device, _CAPABILITY_MAJOR), _attribute(cuda, device, _CAPABILITY_MINOR)),
        total=total.value,
        free=_free_memory(bus.value),
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def _load(library: str) -> Any:
    return ctypes.CDLL(library)


def _attribute(cuda: Any, device: ctypes.c_int, number: int) -> int:
    value = ctypes.c_int()
    _check(cuda, cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device))
    return value.value


def _check(cuda: Any, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode(errors="replace") if text.value else "unknown error"
        raise ExecutorError(f"the NVIDIA driver does not work: {reason} (error {status}); reinstall it or restart")


class _Memory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _free_memory(bus: bytes) -> int | None:
    """Asked of NVML by the bus address, for the two libraries count GPUs in different ways."""
    try:
        nvml = _load(_NVML_LIBRARY)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        handle, memory = ctypes.c_void_p(), _Memory()
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle)):
            return None
        if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        return int(memory.free)
    finally:
        nvml.nvmlShutdown()
