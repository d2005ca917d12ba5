"""What NVML tells of a GPU: a process's memory, the device's, power, clocks, temperature.

Values that cannot be had are an `Untold` reason, never 0. NVML lists processes by the host's ids: inside a container
with process ids of its own, ours is not found. On Windows (WDDM) the system owns the memory and NVML gives none.
Bindings: the ``nvidia-ml-py`` package (module ``pynvml``). Source: NVIDIA's NVML API reference.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True)
class Untold:
    """Why there is no value."""

    reason: str


NOT_LISTED = (
    "NVML does not list the process: it has allocated nothing, or this is a container with process ids of its own "
    "(docker run --pid=host shows it)"
)
WINDOWS = "Windows (WDDM) does not tell a process's GPU memory"


T = TypeVar("T")


class Gpu:
    """One GPU, as NVML sees it."""

    def __init__(self, nvml: Any, index: int = 0) -> None:
        """`nvml` is the initialized ``pynvml`` module. Raises its errors."""
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def process_memory(self, pid: int) -> int | Untold:
        """Bytes that a process holds on the device."""
        found: list[int | None] = []
        try:
            for listing in (
                self._nvml.nvmlDeviceGetComputeRunningProcesses,
                self._nvml.nvmlDeviceGetGraphicsRunningProcesses,
            ):
                found += [process.usedGpuMemory for process in listing(self._handle) if process.pid == pid]
        except self._nvml.NVMLError as error:
            return Untold(f"NVML: {error}")
        if not found:
            return Untold(NOT_LISTED)
        told = [value for value in found if value is not None]  # None stands for NVML_VALUE_NOT_AVAILABLE
        if not told:
            return Untold(WINDOWS if os.name == "nt" else "NVML does not tell the process's memory on this device")
        return int(max(told))  # a process in both lists is the same memory twice

    def used_memory(self) -> int | Untold:
        """Bytes in use on the device, by anyone."""
        return self._ask(lambda: int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used))

    def energy(self) -> float | Untold:
        """Joules since the driver was loaded; the device counts them itself."""
        return self._ask(lambda: float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3)

    def state(self) -> dict[str, float]:
        """Power in watts, clocks in MHz, temperature in degrees Celsius: those that the device tells."""
        n = self._nvml
        asked: dict[str, Callable[[], float]] = {
            "gpu_power_watts": lambda: n.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            "gpu_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(self._handle, n.NVML_CLOCK_SM),
            "gpu_memory_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(self._handle, n.NVML_CLOCK_MEM),
            "gpu_temperature_celsius": lambda: n.nvmlDeviceGetTemperature(self._handle, n.NVML_TEMPERATURE_GPU),
        }
        found = {name: self._ask(ask) for name, ask in asked.items()}
        return {name: value for name, value in found.items() if not isinstance(value, Untold)}

    def description(self) -> dict[str, Any]:
        """Name, memory, driver, CUDA version of the driver and power limit: what stays the same during a run."""
        n = self._nvml
        asked: dict[str, Callable[[], Any]] = {
            "name": lambda: _text(n.nvmlDeviceGetName(self._handle)),
            "memory_bytes": lambda: int(n.nvmlDeviceGetMemoryInfo(self._handle).total),
            "driver": lambda: _text(n.nvmlSystemGetDriverVersion()),
            "cuda": lambda: "{}.{}".format(*divmod(n.nvmlSystemGetCudaDriverVersion_v2() // 10, 100)),
            "power_limit_watts": lambda: n.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3,
        }
        found = {name: self._ask(ask) for name, ask in asked.items()}
        return {name: None if isinstance(value, Untold) else value for name, value in found.items()}

    def _ask(self, ask: Callable[[], T]) -> T | Untold:
        try:
            return ask()
        except self._nvml.NVMLError as error:
            return Untold(f"NVML: {error}")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def open_gpu(index: int = 0) -> Gpu | Untold:
    """The GPU, or why there is none to ask."""
    try:
        import pynvml
    except ImportError:
        return Untold("nvidia-ml-py is not installed; pip install 'zimage-rt[report]'")
    try:
        pynvml.nvmlInit()
        return Gpu(pynvml, index)
    except pynvml.NVMLError as error:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        return Untold(f"no NVIDIA GPU: {error}")
