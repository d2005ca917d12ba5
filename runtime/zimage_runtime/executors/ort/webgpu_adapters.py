"""Which GPU WebGPU computes on, and what it has: on Linux from Vulkan, on Windows from DXGI, on Apple silicon Metal's.

The plug-in chooses by itself (0.4.0 takes no number) and does not say what it chose. Dawn, its WebGPU, sorts adapters
by their kind and keeps Vulkan's order among equals: for high performance, discrete GPUs come first, then integrated
ones, then the processor, then what does not say (``SortAdapters`` in Dawn). Vulkan's own order is that of its loader.
"""

import platform
import sys
from dataclasses import dataclass
from typing import Any

from ...errors import ExecutorError
from ...machine.host_memory import available_memory
from ...machine.vulkan import VulkanDevice, VulkanKind, list_vulkan_devices
from ..overheads import CARD, DESKTOP
from .webgpu_library import library_devices

_ORDER = (VulkanKind.DISCRETE, VulkanKind.INTEGRATED, VulkanKind.SOFTWARE, VulkanKind.VIRTUAL, VulkanKind.OTHER)

BINDING = 1 << 30
"""Bytes that one storage binding spans at least, where a driver does not say: assumed of desktop GPUs."""


@dataclass(frozen=True)
class Adapter:
    """What WebGPU computes on."""

    name: str
    backend: str  # "Vulkan", "D3D12" or "Metal"
    driver: str = ""  # its name and version, where they are known
    software: bool = False  # the processor computes
    budget: int | None = None  # bytes of its memory that may be used; None where that is unknown
    binding: int = BINDING  # bytes that one storage binding spans
    buffer: int = 4 * BINDING  # bytes of the largest buffer

    def __str__(self) -> str:
        return f"{self.name} ({self.backend})"


def find_adapter() -> Adapter:
    """The adapter of this machine. Raises `ExecutorError` that says what is missing."""
    if sys.platform == "win32":
        return _of_windows(library_devices())
    if sys.platform == "darwin":
        return _of_apple()
    return _of_vulkan(list_vulkan_devices())


def _of_vulkan(devices: tuple[VulkanDevice, ...]) -> Adapter:
    device = min(devices, key=lambda device: _ORDER.index(device.kind))
    software = device.kind is VulkanKind.SOFTWARE
    if software:
        budget = available_memory()  # the driver names all of the machine's
    elif device.budget is not None:
        budget = device.budget - DESKTOP.nbytes
    else:
        budget = device.memory - CARD.nbytes
    return Adapter(
        name=device.name,
        backend="Vulkan",
        driver=device.driver,
        software=software,
        budget=max(budget, 0),
        binding=device.binding or BINDING,
        buffer=device.allocation or 4 * BINDING,
    )


def _of_windows(devices: tuple[Any, ...]) -> Adapter:
    """ONNX Runtime describes the GPUs as DXGI does (``device_discovery.cc``): "24142 MB" is memory of the GPU's own."""
    gpus = [device.device for device in devices if device.device.type.name == "GPU"]
    if not gpus:
        raise ExecutorError("no GPU with Direct3D 12 found")
    gpu = min(gpus, key=lambda gpu: int(gpu.metadata.get("DxgiHighPerformanceIndex", len(gpus))))
    megabytes, discrete = gpu.metadata.get("DxgiVideoMemory", ""), gpu.metadata.get("Discrete") == "1"
    number = megabytes.partition(" ")[0]
    budget = max((int(number) << 20) - CARD.nbytes, 0) if discrete and number.isdecimal() else None
    name = gpu.metadata.get("Description") or gpu.vendor or "the GPU"
    return Adapter(name=name.strip(), backend="D3D12", budget=budget)


def _of_apple() -> Adapter:
    """Metal recommends to use two thirds of the memory that the GPU shares, or a little more."""
    import psutil

    if platform.machine() != "arm64":
        raise ExecutorError("WebGPU is for Apple silicon; this Mac has an Intel processor")
    memory = psutil.virtual_memory()
    return Adapter(name="Apple GPU", backend="Metal", budget=min(int(memory.total) * 2 // 3, int(memory.available)))
