"""The GPUs that Vulkan offers on this machine, through its loader alone: names, kinds, drivers, limits and memory.

The layouts are those of ``vulkan_core.h``, which never change; a driver skips structures of a chain that it does not
know, whose values then stay 0. A loader without drivers is the normal case on a machine without a GPU.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ..errors import ExecutorError

_LIBRARY = "vulkan-1.dll" if sys.platform == "win32" else "libvulkan.so.1"


class VulkanKind(IntEnum):
    """``VkPhysicalDeviceType``."""

    OTHER = 0
    INTEGRATED = 1
    DISCRETE = 2
    VIRTUAL = 3
    SOFTWARE = 4  # the processor


@dataclass(frozen=True)
class VulkanDevice:
    """One physical device."""

    name: str  # "AMD Radeon RX 7900 XTX (RADV NAVI31)"
    kind: VulkanKind
    vendor: int  # PCI id
    driver: str  # "radv, Mesa 25.0.7"; empty where it does not say
    binding: int  # bytes that one storage binding may span
    allocation: int  # bytes of the largest single allocation
    memory: int  # bytes of the largest heap on the device
    budget: int | None  # bytes that this process may use of it now, where the driver says


class _Application(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("engine", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api_version", ctypes.c_uint32),
    )


class _InstanceInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.POINTER(_Application)),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


class _Limits(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_uint32 * 7),
        ("storage_buffer_range", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 59),
    )


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("api_version", ctypes.c_uint32),
        ("driver_version", ctypes.c_uint32),
        ("vendor", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("kind", ctypes.c_int),
        ("name", ctypes.c_char * 256),
        ("cache", ctypes.c_uint8 * 16),
        ("limits", _Limits),
        ("sparse", ctypes.c_uint32 * 5),
    )


class _Maintenance(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("descriptors", ctypes.c_uint32),
        ("allocation", ctypes.c_uint64),
    )


class _Driver(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("id", ctypes.c_int),
        ("name", ctypes.c_char * 256),
        ("info", ctypes.c_char * 256),
        ("conformance", ctypes.c_uint8 * 4),
    )


class _MemoryType(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint32), ("heap", ctypes.c_uint32))


class _Heap(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint64), ("flags", ctypes.c_uint32))


class _Memory(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("type_count", ctypes.c_uint32),
        ("types", _MemoryType * 32),
        ("heap_count", ctypes.c_uint32),
        ("heaps", _Heap * 16),
    )


class _Budget(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("budget", ctypes.c_uint64 * 16),
        ("usage", ctypes.c_uint64 * 16),
    )


_APPLICATION, _INSTANCE = 0, 1
_PROPERTIES, _MEMORY = 1000059001, 1000059006
_MAINTENANCE, _DRIVER, _BUDGET = 1000168000, 1000196000, 1000237000
_VERSION_1_1 = 1 << 22 | 1 << 12
_NO_DRIVER = -9  # VK_ERROR_INCOMPATIBLE_DRIVER: the loader found none
_DEVICE_LOCAL = 1


def list_vulkan_devices() -> tuple[VulkanDevice, ...]:
    """The physical devices in Vulkan's order.

    Raises `ExecutorError` that says what is missing: the loader, or a driver.
    """
    try:
        vulkan = _load(_LIBRARY)
    except OSError:
        raise ExecutorError(f"no Vulkan loader found ({_LIBRARY}); install the GPU's Vulkan driver") from None
    application = _Application(type=_APPLICATION, api_version=_VERSION_1_1)
    info = _InstanceInfo(type=_INSTANCE, application=ctypes.pointer(application))
    instance = ctypes.c_void_p()
    status = vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance))
    if status == _NO_DRIVER:
        raise ExecutorError("no Vulkan driver found; install the GPU's")
    if status != 0:
        raise ExecutorError(f"Vulkan does not start (error {status}); reinstall the GPU's driver")
    try:
        return tuple(_look(vulkan, ctypes.c_void_p(handle)) for handle in _handles(vulkan, instance))
    finally:
        vulkan.vkDestroyInstance(instance, None)


_load: Callable[[str], Any] = ctypes.CDLL


def _handles(vulkan: Any, instance: ctypes.c_void_p) -> list[int]:
    count = ctypes.c_uint32()
    if vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None) != 0 or count.value == 0:
        raise ExecutorError("no Vulkan driver found; install the GPU's")
    handles = (ctypes.c_void_p * count.value)()
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
    return [handle for handle in handles[: count.value] if handle]


def _look(vulkan: Any, handle: ctypes.c_void_p) -> VulkanDevice:
    driver = _Driver(type=_DRIVER)
    maintenance = _Maintenance(type=_MAINTENANCE, next=ctypes.addressof(driver))
    properties = _Properties(type=_PROPERTIES, next=ctypes.addressof(maintenance))
    vulkan.vkGetPhysicalDeviceProperties2(handle, ctypes.byref(properties))
    budget = _Budget(type=_BUDGET)
    memory = _Memory(type=_MEMORY, next=ctypes.addressof(budget))
    vulkan.vkGetPhysicalDeviceMemoryProperties2(handle, ctypes.byref(memory))
    local = [number for number in range(memory.heap_count) if memory.heaps[number].flags & _DEVICE_LOCAL]
    largest = max(local, key=lambda number: int(memory.heaps[number].size), default=None)
    kind = properties.kind if properties.kind in list(VulkanKind) else VulkanKind.OTHER
    return VulkanDevice(
        name=_text(properties.name),
        kind=VulkanKind(kind),
        vendor=properties.vendor,
        driver=", ".join(filter(None, (_text(driver.name), _text(driver.info)))),
        binding=properties.limits.storage_buffer_range,
        allocation=maintenance.allocation,
        memory=0 if largest is None else memory.heaps[largest].size,
        budget=None if largest is None else budget.budget[largest] or None,
    )


def _text(value: bytes) -> str:
    return value.decode(errors="replace").strip()
