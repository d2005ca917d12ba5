"""Vulkan's devices, from a loader that is a stand-in: it fills the structures that it is given, as a driver would."""

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest
from facts import raises_with

from zimage_runtime.errors import ExecutorError
from zimage_runtime.machine import vulkan
from zimage_runtime.machine.vulkan import VulkanKind, list_vulkan_devices

GIB = 1 << 30


@dataclass
class Physical:
    """A device as its driver describes it."""

    name: bytes = b"AMD Radeon RX 7900 XTX (RADV NAVI31)"
    kind: int = 2
    driver: tuple[bytes, bytes] = (b"radv", b"Mesa 25.0.7")
    heaps: tuple[tuple[int, bool], ...] = ((64 * GIB, False), (24 * GIB, True), (GIB // 4, True))
    budget: tuple[int, ...] = (0, 20 * GIB, 0)
    binding: int = 2**32 - 1
    allocation: int = 4 * GIB
    old: bool = False  # knows none of the chained structures


class Loader:
    """``libvulkan``, as far as it is asked. `alive` counts instances."""

    def __init__(self, *devices: Physical, status: int = 0) -> None:
        self.devices, self.status, self.alive = devices, status, 0

    def vkCreateInstance(self, info: Any, allocator: Any, instance: Any) -> int:  # noqa: N802
        application = info._obj.application.contents
        assert (info._obj.type, application.type, application.api_version >> 12) == (1, 0, 1 << 10 | 1)
        if self.status == 0:
            instance._obj.value = 0x7F00_0000_1000
            self.alive += 1
        return self.status

    def vkDestroyInstance(self, instance: Any, allocator: Any) -> None:  # noqa: N802
        assert instance.value == 0x7F00_0000_1000
        self.alive -= 1

    def vkEnumeratePhysicalDevices(self, instance: Any, count: Any, handles: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        for number in range(len(self.devices) if handles is not None else 0):
            handles[number] = 0x7F00_0000_2000 + number
        return 0

    def vkGetPhysicalDeviceProperties2(self, handle: Any, properties: Any) -> None:  # noqa: N802
        device, found = self.devices[handle.value - 0x7F00_0000_2000], properties._obj
        assert found.type == 1000059001
        found.name, found.kind, found.vendor = device.name, device.kind, 0x1002
        found.limits.storage_buffer_range = device.binding
        if not device.old:
            chain = chained(found)
            chain[1000168000].allocation = device.allocation
            chain[1000196000].name, chain[1000196000].info = device.driver

    def vkGetPhysicalDeviceMemoryProperties2(self, handle: Any, memory: Any) -> None:  # noqa: N802
        device, found = self.devices[handle.value - 0x7F00_0000_2000], memory._obj
        assert found.type == 1000059006
        found.heap_count = len(device.heaps)
        for number, (size, local) in enumerate(device.heaps):
            found.heaps[number].size, found.heaps[number].flags = size, int(local)
        if not device.old:
            budget = chained(found)[1000237000].budget
            for number, size in enumerate(device.budget):
                budget[number] = size


STRUCTURES = {1000168000: vulkan._Maintenance, 1000196000: vulkan._Driver, 1000237000: vulkan._Budget}


def chained(structure: Any) -> dict[int, Any]:
    """The structures of a chain, by their type."""
    found, address = {}, structure.next
    while address:
        kind = ctypes.c_int.from_address(address).value
        found[kind] = STRUCTURES[kind].from_address(address)
        address = found[kind].next
    return found


def test_layouts_are_those_of_the_header() -> None:
    """Sizes on a system with addresses of 64 bits, from ``vulkan_core.h``."""
    assert ctypes.sizeof(vulkan._Limits) == 504
    assert ctypes.sizeof(vulkan._Properties) == 16 + 824
    assert ctypes.sizeof(vulkan._Memory) == 16 + 520
    assert ctypes.sizeof(vulkan._Driver) == 16 + 4 + 256 + 256 + 4
    assert vulkan._Limits.storage_buffer_range.offset == 28
    assert vulkan._Properties.limits.offset == 16 + 296


def test_a_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(Physical(), Physical(name=b"llvmpipe", kind=4), Physical(kind=77))
    monkeypatch.setattr(vulkan, "_load", lambda library: loader)
    radeon, llvmpipe, other = list_vulkan_devices()
    assert loader.alive == 0
    assert (radeon.name, radeon.kind, radeon.vendor) == (Physical.name.decode(), VulkanKind.DISCRETE, 0x1002)
    assert radeon.driver == "radv, Mesa 25.0.7"
    assert (radeon.memory, radeon.budget) == (24 * GIB, 20 * GIB)
    assert (radeon.binding, radeon.allocation) == (2**32 - 1, 4 * GIB)
    assert (llvmpipe.kind, other.kind) == (VulkanKind.SOFTWARE, VulkanKind.OTHER)


def test_an_old_driver_knows_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vulkan, "_load", lambda library: Loader(Physical(old=True), Physical(heaps=())))
    old, bare = list_vulkan_devices()
    assert (old.driver, old.allocation, old.budget, old.memory) == ("", 0, None, 24 * GIB)
    assert (bare.memory, bare.budget) == (0, None)


@pytest.mark.parametrize(
    ("loader", "fact"), [(Loader(), "driver"), (Loader(status=-9), "driver"), (Loader(status=-3), "-3")]
)
def test_what_is_missing_is_said(loader: Loader, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vulkan, "_load", lambda library: loader)
    with raises_with(ExecutorError, "Vulkan", fact):
        list_vulkan_devices()
    assert loader.alive == 0


def test_without_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(library: str) -> Any:
        raise OSError(f"{library}: cannot open shared object file")

    monkeypatch.setattr(vulkan, "_load", load)
    with raises_with(ExecutorError, "Vulkan loader", vulkan._LIBRARY):
        list_vulkan_devices()
