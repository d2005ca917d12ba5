"""The `webgpu` executor without an adapter: which GPU it takes, what it refuses, and what `auto` does.

Machines and kernels are stand-ins. `executors/test_webgpu_executor` computes on an adapter.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from facts import assert_facts, raises_with
from gpu_stand_in import Card, install_gpus, remove_driver
from stale_attention import stale_attention

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import WEBGPU, WEBGPU_FUSED, Precision
from zimage_runtime.errors import BundleError, ExecutorError, RequestError
from zimage_runtime.executors.choose import ExecutorChoice
from zimage_runtime.executors.examination import Verdict
from zimage_runtime.executors.ort import attention_verdict, webgpu, webgpu_adapters, webgpu_library
from zimage_runtime.executors.ort.attention_verdict import attention, verdict_on
from zimage_runtime.executors.ort.webgpu_adapters import Adapter, find_adapter
from zimage_runtime.executors.overheads import CARD, DESKTOP
from zimage_runtime.executors.protocol import Hardware, Options, Work
from zimage_runtime.machine.vulkan import VulkanDevice, VulkanKind
from zimage_runtime.model.geometry import image_geometry

GIB = 1 << 30
RADEON = Adapter("AMD Radeon RX 7900 XTX", "Vulkan", "radv, Mesa 25.0.7", budget=20 * GIB)
LLVMPIPE = Adapter("llvmpipe", "Vulkan", "llvmpipe, Mesa 25.0.7", software=True, budget=8 * GIB, binding=GIB // 8)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


def in_precision(bundle: Bundle, precision: Precision) -> Bundle:
    return Bundle(bundle.root, replace(bundle.manifest, precision=precision))


def without_programs(bundle: Bundle) -> Bundle:
    programs = {
        program: {name: record for name, record in records.items() if name != WEBGPU}
        for program, records in bundle.manifest.programs.items()
    }
    return Bundle(bundle.root, replace(bundle.manifest, programs=programs))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine without NVIDIA's driver, with an adapter or why it has none, with the plug-in or without it."""

    def set_up(adapter: Adapter | str, *, installed: bool = True, fault: str | None = None) -> None:
        def find() -> Adapter:
            if isinstance(adapter, str):
                raise ExecutorError(adapter)
            return adapter

        remove_driver(monkeypatch)
        monkeypatch.setattr(webgpu, "find_adapter", find)
        monkeypatch.setattr(webgpu, "why_no_library", lambda: None if installed else "the plug-in is not installed")
        monkeypatch.setattr(webgpu, "fault_of", lambda answer: fault)
        monkeypatch.setattr(webgpu, "verdict_on", lambda adapter, head: attention_verdict.Verdict(False, "is wrong"))
        monkeypatch.setattr(webgpu, "library_version", lambda: "onnxruntime 1, plug-in 0.4.0")

    return set_up


Machine = Callable[..., None]


# Which adapter


def device(kind: VulkanKind, name: str, **changes: Any) -> VulkanDevice:
    values = {"vendor": 1, "driver": "a driver", "binding": GIB, "allocation": 4 * GIB, "memory": 8 * GIB}
    return VulkanDevice(name=name, kind=kind, budget=6 * GIB, **{**values, **changes})  # type: ignore[arg-type]


def on_linux(monkeypatch: pytest.MonkeyPatch, *devices: VulkanDevice) -> Adapter:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(webgpu_adapters, "list_vulkan_devices", lambda: devices)
    return find_adapter()


def test_discrete_gpus_come_first_then_integrated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Dawn sorts them: the first of Vulkan's among equals, and what says nothing after the processor."""
    software, virtual = device(VulkanKind.SOFTWARE, "llvmpipe"), device(VulkanKind.VIRTUAL, "virtual")
    integrated = device(VulkanKind.INTEGRATED, "integrated")
    first, second = device(VulkanKind.DISCRETE, "first"), device(VulkanKind.DISCRETE, "second")
    assert on_linux(monkeypatch, virtual, software, integrated, first, second).name == "first"
    assert on_linux(monkeypatch, virtual, software, integrated).name == "integrated"
    found = on_linux(monkeypatch, virtual, software)
    assert (found.name, found.software) == ("llvmpipe", True)
    assert not on_linux(monkeypatch, virtual).software


def test_memory_is_what_the_driver_leaves_to_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_linux(monkeypatch, device(VulkanKind.DISCRETE, "a card"))
    assert (found.budget, found.binding, found.buffer) == (6 * GIB - DESKTOP.nbytes, GIB, 4 * GIB)
    older = replace(device(VulkanKind.DISCRETE, "a card"), budget=None, allocation=0)
    found = on_linux(monkeypatch, older)
    assert (found.budget, found.buffer) == (8 * GIB - CARD.nbytes, 4 * GIB)
    monkeypatch.setattr(webgpu_adapters, "available_memory", lambda: 3 * GIB)
    assert on_linux(monkeypatch, device(VulkanKind.SOFTWARE, "llvmpipe")).budget == 3 * GIB


def dxgi(name: str, order: int, memory: str, discrete: str, kind: str = "GPU") -> Any:
    metadata = {
        "Description": name,
        "DxgiHighPerformanceIndex": str(order),
        "DxgiVideoMemory": memory,
        "Discrete": discrete,
    }
    return SimpleNamespace(device=SimpleNamespace(type=SimpleNamespace(name=kind), vendor="", metadata=metadata))


def on_windows(monkeypatch: pytest.MonkeyPatch, *devices: Any) -> Adapter:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(webgpu_adapters, "library_devices", lambda: devices)
    return find_adapter()


def test_on_windows_dxgi_says_which_performs_best(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, card = dxgi("Intel(R) UHD Graphics ", 1, "128 MB", "0"), dxgi("NVIDIA RTX", 0, "24142 MB", "1")
    found = on_windows(monkeypatch, shared, card)
    assert (found.name, found.backend, found.budget) == ("NVIDIA RTX", "D3D12", (24142 << 20) - CARD.nbytes)
    found = on_windows(monkeypatch, shared)
    assert (found.name, found.budget) == ("Intel(R) UHD Graphics", None), "its memory is the machine's"
    with raises_with(ExecutorError, "Direct3D 12"):
        on_windows(monkeypatch, dxgi("a processor", 0, "", "", kind="CPU"))


def test_apple_silicon_may_use_two_thirds_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    for available, budget in ((23 * GIB, 16 * GIB), (9 * GIB, 9 * GIB)):
        memory = SimpleNamespace(total=24 * GIB, available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        found = find_adapter()
        assert (found.backend, found.budget) == ("Metal", budget)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with raises_with(ExecutorError, "Apple silicon", "Intel"):
        find_adapter()


# What is refused


def open_named(bundle: Bundle, **options: Any) -> Any:
    return ExecutorChoice(bundle, WEBGPU, Options(**options)).open()


def test_bf16_is_refused_with_the_precisions_to_use(machine: Machine, opened: Bundle) -> None:
    machine(RADEON)
    with raises_with(RequestError, "webgpu", "bf16", "fp16", "int8", "int4"):
        open_named(in_precision(opened, Precision.BF16))
    with raises_with(BundleError, "bf16", "fp16"):
        work = Work(geometry=image_geometry(64, 64, opened.manifest.config), tokens=8)
        webgpu.KIND.predict(in_precision(opened, Precision.BF16), work, Hardware(memory=GIB))


def test_what_is_missing_is_named_with_what_adds_it(machine: Machine, opened: Bundle) -> None:
    machine(RADEON)
    with raises_with(RequestError, "denoiser", "zimage-export programs"):
        open_named(without_programs(opened))
    with raises_with(RequestError, "GPU 1", "--device"):
        open_named(opened, device=1)
    machine(RADEON, installed=False)
    with raises_with(RequestError, "the plug-in is not installed"):
        open_named(opened)
    machine("no Vulkan loader found (libvulkan.so.1)")
    with raises_with(RequestError, "libvulkan.so.1", "zimage-rt doctor", "--executor cpu"):
        open_named(opened)


def test_the_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_facts(str(webgpu_library.why_no_library()), "onnxruntime-ep-webgpu", "pip install 'zimage-rt[webgpu]'")


def test_an_adapter_that_computes_wrong_is_not_used(machine: Machine, opened: Bundle) -> None:
    machine(RADEON, fault="products come out wrong by 3.0e-01")
    with raises_with(ExecutorError, RADEON.name, "3.0e-01", "--executor cpu"):
        open_named(opened)
    choice = ExecutorChoice(opened)
    assert choice.open().name == "cpu"
    assert_facts(choice.why, "no webgpu", "3.0e-01")


def test_unknown_memory_asks_for_vram(machine: Machine, opened: Bundle) -> None:
    machine(replace(RADEON, budget=None))
    with raises_with(ExecutorError, RADEON.name, "--vram"):
        open_named(opened)
    assert open_named(opened, vram=7 * GIB).budget == 7 * GIB


def test_the_budget_is_the_adapters_or_what_is_given(machine: Machine, opened: Bundle) -> None:
    machine(RADEON)
    assert open_named(opened).budget == 20 * GIB
    assert open_named(opened, vram=GIB).budget == GIB


# auto


def test_auto_takes_it_before_the_cpu_and_says_which_adapter(machine: Machine, opened: Bundle) -> None:
    machine(RADEON)
    choice = ExecutorChoice(opened)
    chosen = choice.plan(Work(geometry=image_geometry(64, 64, opened.manifest.config), tokens=8))
    assert chosen.executor.name == WEBGPU
    assert_facts(str(chosen.why), "webgpu", RADEON.name, "no NVIDIA driver found")
    assert not chosen.unexpected, "a GPU is used"


def test_auto_prefers_cuda(machine: Machine, opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(RADEON)
    install_gpus(monkeypatch, Card())
    monkeypatch.setattr("zimage_runtime.executors.ort.cuda.why_no_provider", lambda gpu: None)
    assert ExecutorChoice(opened).open().name == "cuda"


def test_auto_never_takes_a_software_adapter(machine: Machine, opened: Bundle) -> None:
    """Nor asks it anything; by its name it is used."""
    machine(LLVMPIPE)
    choice = ExecutorChoice(opened)
    chosen = choice.plan(Work(geometry=image_geometry(64, 64, opened.manifest.config), tokens=8))
    assert chosen.executor.name == "cpu"
    assert not chosen.unexpected, "there is no GPU to be used"
    assert open_named(opened).name == WEBGPU


def test_auto_says_what_keeps_it_from_a_gpu(machine: Machine, opened: Bundle) -> None:
    machine(RADEON, installed=False)
    chosen = ExecutorChoice(opened).plan(Work(geometry=image_geometry(64, 64, opened.manifest.config), tokens=8))
    assert chosen.executor.name == "cpu"
    assert chosen.unexpected
    assert_facts(str(chosen.why), "no webgpu", "the plug-in is not installed")


# doctor


def test_doctor_describes_the_adapter(machine: Machine) -> None:
    machine(RADEON)
    found = webgpu.KIND.examine()
    assert found.verdict is Verdict.OK
    assert_facts(found.text, RADEON.name, "Vulkan", RADEON.driver, "shader-f16", "4.00 GiB")
    assert found.values["known_answers"]
    assert not found.values["fused"]
    machine(LLVMPIPE)
    found = webgpu.KIND.examine()
    assert found.verdict is Verdict.NOTE
    assert_facts(found.text, "llvmpipe", "--executor webgpu")


def test_doctor_says_what_is_wrong_or_missing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(RADEON, fault="attention comes out wrong by 3.0e-01")
    found = webgpu.KIND.examine()
    assert found.verdict is Verdict.PROBLEM
    assert_facts(found.text, RADEON.name, RADEON.driver, "3.0e-01")
    machine(LLVMPIPE, fault="no adapter")
    assert webgpu.KIND.examine().verdict is Verdict.NOTE, "nothing that is used is broken"
    machine(RADEON, installed=False)
    found = webgpu.KIND.examine()
    assert found.verdict is Verdict.NOTE
    assert_facts(found.text, RADEON.name, "the plug-in is not installed")
    machine("no Vulkan loader found")
    found = webgpu.KIND.examine()
    assert found.verdict is Verdict.OK
    assert_facts(found.text, "no Vulkan loader found")
    machine(RADEON)
    monkeypatch.setattr(webgpu, "fault_of", lambda answer: "no fp16" if answer == "fp16" else None)
    found = webgpu.KIND.examine()
    assert (found.verdict, found.values["shader_f16"]) == (Verdict.OK, False)
    assert_facts(found.text, "no shader-f16")


def test_the_verdict_decides_which_program_runs(
    machine: Machine, opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a right and a wrong kernel in the adapter's place."""
    work = Work(geometry=image_geometry(64, 64, opened.manifest.config), tokens=8)
    for kernel, program in ((attention, WEBGPU_FUSED), (stale_attention, WEBGPU)):
        machine(RADEON)
        verdict_on.cache_clear()
        monkeypatch.setattr(webgpu, "verdict_on", verdict_on)
        monkeypatch.setattr(attention_verdict, "attend_on_webgpu", kernel)
        executor = open_named(opened)
        plan = executor.plan(work)
        assert (executor.denoiser, plan.denoiser, executor.computation(plan).program) == (program,) * 3
    verdict_on.cache_clear()
