"""The GPUs that CUDA offers to this process, in the order in which CUDA numbers them.

CUDA sorts them by speed unless ``CUDA_DEVICE_ORDER`` says ``PCI_BUS_ID``, hides what ``CUDA_VISIBLE_DEVICES`` leaves
out, and shows a slice of a partitioned GPU as a whole one. Only its driver knows the outcome, so it is asked: NVML
counts all GPUs of the machine by their place on the bus. Asking starts no context and takes no GPU memory.
Source: CUDA driver API (``cuda.h``) and "CUDA Environment Variables" in NVIDIA's CUDA C++ Programming Guide.
"""

import ctypes
import os
import uuid
from typing import Any

from ..errors import ExecutorError

_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def cuda_devices() -> tuple[uuid.UUID, ...]:
    """The ids of the GPUs, device 0 first; never empty.

    Raises `ExecutorError` that says what is missing: the driver, a GPU, or a driver that works.
    """
    try:
        cuda = _load(_LIBRARY)
    except OSError:
        raise ExecutorError(
            f"the NVIDIA driver's CUDA library ({_LIBRARY}) was not found; "
            "a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        ) from None
    status = cuda.cuInit(0)
    if status == _NO_DEVICE:
        raise ExecutorError(_no_gpu())
    _check(cuda, status)
    count = ctypes.c_int()
    _check(cuda, cuda.cuDeviceGetCount(ctypes.byref(count)))
    if not count.value:
        raise ExecutorError(_no_gpu())
    return tuple(_device_id(cuda, number) for number in range(count.value))


def has_cuda_library() -> bool:
    """Whether NVIDIA's driver has brought its CUDA library."""
    try:
        _load(_LIBRARY)
    except OSError:
        return False
    return True


def _device_id(cuda: Any, number: int) -> uuid.UUID:
    device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    _check(cuda, cuda.cuDeviceGet(ctypes.byref(device), number))
    # from CUDA 11.4 on there is a second one, which gives the slice's id where the GPU is partitioned
    ask = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
    _check(cuda, ask(ctypes.byref(found), device))
    return uuid.UUID(bytes=bytes(found))


def _no_gpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return f"the NVIDIA driver offers no GPU{hidden}"


def _load(library: str) -> Any:
    return ctypes.CDLL(library)


def _check(cuda: Any, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode(errors="replace") if text.value else "unknown error"
        raise ExecutorError(f"the NVIDIA driver does not work: {reason} (error {status}); reinstall it or restart")
