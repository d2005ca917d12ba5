"""What changes on a GPU while it works: memory in use, energy, power, clocks and temperature.

A monitor keeps NVML open, so that it can be asked a hundred times a second.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self, TypeVar

from ..errors import ExecutorError
from .gpus import Gpu, find_gpu
from .nvml import Unmeasured, nvml_session, process_memory

T = TypeVar("T")


class GpuMonitor:
    """Watches one GPU until it is closed."""

    def __init__(self, gpu: Gpu) -> None:
        """Raises `ExecutorError` where NVML does not work, or does not know the GPU."""
        self.gpu = gpu
        with ExitStack() as opened:
            self._nvml = opened.enter_context(nvml_session())
            try:
                self._handle = self._nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
            except self._nvml.NVMLError as error:
                raise ExecutorError(f"{gpu.name} cannot be watched: {error}") from None
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the monitoring. Nothing can be read afterwards."""
        self._opened.close()

    def process_memory(self, pid: int) -> int | Unmeasured:
        """Bytes that a process uses on the GPU."""
        return process_memory(self._nvml, self._handle, pid)

    def used_memory(self) -> int | Unmeasured:
        """Bytes in use on the GPU, by all processes."""
        return self._ask(lambda: int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used))

    def energy(self) -> float | Unmeasured:
        """Joules since the driver was loaded, by the GPU's own counter."""
        return self._ask(lambda: float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3)

    def state(self) -> dict[str, float]:
        """Power in watts, clocks in MHz and temperature in degrees Celsius: those that this GPU reports."""
        n = self._nvml
        questions: dict[str, Callable[[], float]] = {
            "gpu_power_watts": lambda: n.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            "gpu_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(self._handle, n.NVML_CLOCK_SM),
            "gpu_memory_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(self._handle, n.NVML_CLOCK_MEM),
            "gpu_temperature_celsius": lambda: n.nvmlDeviceGetTemperature(self._handle, n.NVML_TEMPERATURE_GPU),
        }
        found = {name: self._ask(question) for name, question in questions.items()}
        return {name: value for name, value in found.items() if not isinstance(value, Unmeasured)}

    def description(self) -> dict[str, Any]:
        """What stays the same during a run: name, memory, versions of driver and CUDA, and the power limit."""
        limit = self._ask(lambda: float(self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle)) / 1e3)
        return {
            "name": self.gpu.name,
            "memory_bytes": self.gpu.total,
            "driver": self.gpu.driver,
            "cuda": self.gpu.cuda,
            "power_limit_watts": None if isinstance(limit, Unmeasured) else limit,
        }

    def _ask(self, question: Callable[[], T]) -> T | Unmeasured:
        try:
            return question()
        except self._nvml.NVMLError as error:
            return Unmeasured(f"NVML: {error}")


def open_monitor(index: int = 0) -> GpuMonitor | Unmeasured:
    """A monitor of the GPU that CUDA calls device `index`, or why there is none."""
    try:
        return GpuMonitor(find_gpu(index))
    except ExecutorError as error:
        return Unmeasured(str(error))
