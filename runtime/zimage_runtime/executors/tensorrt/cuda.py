"""`Device` on NVIDIA's runtime through cuda-bindings: memory, streams, events and graphs without torch."""

import ctypes
import threading
from typing import Any

import numpy as np

from ...errors import DeviceLostError, ExecutorError
from .device import DeviceEvent, Graph, OutOfDeviceMemoryError, Pinned, PinnedMemoryError, Stream


class CudaDevice:
    """One CUDA device. Implements `Device`."""

    def __init__(self, index: int = 0) -> None:
        """Raises `ExecutorError` where there is no driver or no such GPU."""
        self._cuda = _bindings()
        self._index = index
        self._threads = threading.local()  # CUDA's current device is a property of each thread
        self._threads.device = index  # so that counting devices does not select one
        count = self._call("cudaGetDeviceCount")
        if count == 0:
            raise ExecutorError(NO_GPU)
        if index >= count:
            raise ExecutorError(f"GPU {index} was not found: the driver reports {count}, numbered from 0")
        self._threads.device = None
        properties = self._call("cudaGetDeviceProperties", index)
        self._capability = (int(properties.major), int(properties.minor))
        self._name = bytes(properties.name).split(b"\0")[0].decode(errors="replace")

    @property
    def capability(self) -> tuple[int, int]:
        return self._capability

    @property
    def name(self) -> str:
        return self._name

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, nbytes: int) -> Pinned:
        address = int(self._call("cudaHostAlloc", nbytes, self._cuda.cudaHostAllocDefault))
        return Pinned(address, np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address)))

    def free_pinned(self, pinned: Pinned) -> None:
        self._call("cudaFreeHost", pinned.address)

    def create_stream(self) -> Stream:
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: Stream) -> None:
        self._call("cudaStreamDestroy", stream)

    def create_event(self) -> DeviceEvent:
        return int(self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming))

    def destroy_event(self, event: DeviceEvent) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: DeviceEvent, stream: Stream) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: Stream, event: DeviceEvent) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: DeviceEvent) -> None:
        self._call("cudaEventSynchronize", event)

    def synchronize(self, stream: Stream) -> None:
        self._call("cudaStreamSynchronize", stream)

    def upload(self, device: int, host: int, nbytes: int, stream: Stream) -> None:
        self._copy(device, host, nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, host: int, device: int, nbytes: int, stream: Stream) -> None:
        self._copy(host, device, nbytes, "cudaMemcpyDeviceToHost", stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self._copy(target, source, nbytes, "cudaMemcpyDeviceToDevice", stream)

    def _copy(self, target: int, source: int, nbytes: int, kind: str, stream: Stream) -> None:
        self._call("cudaMemcpyAsync", target, source, nbytes, getattr(self._cuda.cudaMemcpyKind, kind), stream)

    def begin_capture(self, stream: Stream) -> None:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Stream) -> Graph:
        captured = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", captured, 0))
        finally:
            self._call("cudaGraphDestroy", captured)

    def launch(self, graph: Graph, stream: Stream) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Graph) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call of the runtime: its results. Raises `ExecutorError`."""
        if getattr(self._threads, "device", None) != self._index:
            self._threads.device = self._index
            self._call("cudaSetDevice", self._index)
        error, *values = getattr(self._cuda, name)(*arguments)
        if error == self._cuda.cudaError_t.cudaSuccess:
            return values[0] if len(values) == 1 else tuple(values)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            size = f" of {arguments[0] / 2**20:.0f} MiB" if arguments and isinstance(arguments[0], int) else ""
            if name == "cudaHostAlloc":
                raise PinnedMemoryError(
                    f"the operating system pins no more of the machine's memory (an allocation{size}); close other "
                    "programs, or lower --size"
                )
            raise OutOfDeviceMemoryError(
                f"the GPU has no memory left for an allocation{size}; lower --vram, or close other programs on the GPU"
            )
        if error.name in _NO_GPU:
            raise ExecutorError(NO_GPU)
        text = self._cuda.cudaGetErrorString(error)[1]
        text = text.decode() if isinstance(text, bytes) else text
        if error.name in _LOST:
            raise DeviceLostError(f"the GPU was lost ({error.name}: {text}); run again, or restart the machine")
        raise ExecutorError(f"{name} failed: {error.name}: {text}")


_NO_GPU = ("cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorStubLibrary", "cudaErrorInitializationError")

_LOST = frozenset(
    f"cudaError{name}"
    for name in (
        "IllegalAddress",
        "LaunchFailure",
        "LaunchTimeout",
        "IllegalInstruction",
        "MisalignedAddress",
        "InvalidAddressSpace",
        "InvalidPc",
        "HardwareStackError",
        "Assert",
        "ECCUncorrectable",
        "NvlinkUncorrectable",
        "Contained",
        "TensorMemoryLeak",
        "DevicesUnavailable",
        "ContextIsDestroyed",
        "ExternalDevice",
        "MpsClientTerminated",
        "CudartUnloading",
        "Unknown",
    )
)
"""Errors after which every call of the process fails. Source: `cudaError_t` in the CUDA runtime's reference, "any
further CUDA work will return the same error", and what a driver that was reset or a GPU off the bus gives."""

NO_GPU = (
    "the tensorrt executor found no NVIDIA GPU with its driver; "
    "`zimage-rt doctor` shows what is missing, and --executor cpu always works"
)

NO_PACKAGE = "the tensorrt executor needs packages that are not installed; run `pip install 'zimage-rt[tensorrt]'`"


def _bindings() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise ExecutorError(NO_PACKAGE) from None
    return runtime
