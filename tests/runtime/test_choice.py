"""Which executor generates, and why: never a silent one. The driver is a stand-in that answers as NVIDIA's does."""

import ctypes
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import ExecutorError, RequestError
from zimage_runtime.executors.choose import SWAP_TO_GPU, budget, choose, make_executor
from zimage_runtime.executors.ort import device as ort_cuda
from zimage_runtime.machine import gpus as nvidia
from zimage_runtime.pipeline import Pipeline

GIB = 1 << 30


class Driver:
    """``libcuda``, as far as it is asked."""

    def __init__(self, init: int = 0, count: int = 1, capability: tuple[int, int] = (8, 9)) -> None:
        self.init, self.count, self.capability = init, count, capability

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"unknown error" if status == 999 else b"system has unsupported display driver"
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA GeForce RTX 4090"
        return 0

    def cuDeviceGetPCIBusId(self, bus: Any, length: int, device: Any) -> int:  # noqa: N802
        bus.value = b"0000:01:00.0"
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:  # noqa: N802
        total._obj.value = 24 * GIB
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13020
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: self.capability[0], 76: self.capability[1]}[number]
        return 0


class Nvml:
    """``libnvidia-ml``, as far as it is asked."""

    def __init__(self) -> None:
        self.shut = False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:  # noqa: N802
        assert bus == b"0000:01:00.0"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.total, memory._obj.free = 24 * GIB, 20 * GIB
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.shut = True
        return 0


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, nvml: Nvml | None = None) -> None:
    def load(library: str) -> Any:
        found = driver if "cuda" in library else nvml
        if found is None:
            raise OSError(f"{library}: cannot open shared object file")
        return found

    monkeypatch.setattr(nvidia, "_load", load)


def with_gpu_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


def in_precision(bundle: Bundle, precision: str) -> Bundle:
    from dataclasses import replace

    from zimage_runtime.bundle.manifest import Precision

    return Bundle(bundle.root, replace(bundle.manifest, precision=Precision(precision)))


def test_the_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    install(monkeypatch, Driver(), nvml)
    gpu = nvidia.find_gpu()
    assert gpu == nvidia.Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 * GIB, 20 * GIB, "13.2")
    assert str(gpu) == "NVIDIA GeForce RTX 4090 (compute capability 8.9)"
    assert nvml.shut
    assert ctypes.sizeof(nvidia._Memory) == 24  # nvmlMemory_t, three unsigned long long


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (None, "no NVIDIA driver is installed"),
        (Driver(init=100), "finds no GPU"),
        (Driver(count=0), "finds no GPU"),
        (Driver(init=999), "unknown error (error 999)"),
        (Driver(init=803), "unsupported display driver (error 803)"),
    ],
)
def test_what_is_wrong_with_the_driver_is_said(
    monkeypatch: pytest.MonkeyPatch, opened: Bundle, driver: Driver | None, said: str
) -> None:
    install(monkeypatch, driver)
    with pytest.raises(ExecutorError) as error:
        nvidia.find_gpu()
    assert said in str(error.value)
    choice = choose(opened, "auto")
    assert choice.executor == "cpu"
    assert choice.why.startswith("no NVIDIA GPU: ")
    assert said in choice.why
    with pytest.raises(RequestError) as refusal:
        choose(opened, "cuda")
    assert "executor 'cuda' cannot run here" in str(refusal.value)
    assert said in str(refusal.value)


def test_cuda_is_chosen_where_all_is_there(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install(monkeypatch, Driver(), Nvml())
    with_gpu_package(monkeypatch)
    choice = choose(opened, "auto")
    assert choice.executor == "cuda"
    assert choice.why.endswith("NVIDIA GeForce RTX 4090 (compute capability 8.9) is there")
    assert make_executor(opened, choice, None).name == "cuda"
    assert choose(opened, "cuda").why == "asked for"
    assert choose(opened, "cpu").executor == "cpu"
    assert Pipeline.from_bundle(opened.root).executor.name == "cuda"


def test_a_gpu_without_its_package_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install(monkeypatch, Driver(), Nvml())
    choice = choose(opened, "auto")
    assert choice.executor == "cpu"
    for command in SWAP_TO_GPU:
        assert f"`{command}`" in choice.why
    with pytest.raises(RequestError) as refusal:
        choose(opened, "cuda")
    for command in SWAP_TO_GPU:
        assert f"`{command}`" in str(refusal.value)


def test_a_provider_that_appears_with_its_libraries_is_found(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install(monkeypatch, Driver(), Nvml())
    monkeypatch.setattr(ort_cuda, "preload_libraries", lambda: with_gpu_package(monkeypatch))
    assert choose(opened, "auto").executor == "cuda"


def test_bf16_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install(monkeypatch, Driver(capability=(7, 5)), Nvml())
    with_gpu_package(monkeypatch)
    with pytest.raises(RequestError, match=r"7\.5.* fp16"):
        choose(in_precision(opened, "bf16"), "cuda")
    for precision in ("fp16", "fp32"):
        assert choose(in_precision(opened, precision), "auto").executor == "cuda"
    install(monkeypatch, Driver(capability=(8, 0)), Nvml())
    assert choose(in_precision(opened, "bf16"), "auto").executor == "cuda"


def test_int8_needs_a_gpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install(monkeypatch, Driver(capability=(6, 0)), Nvml())
    with_gpu_package(monkeypatch)
    with pytest.raises(RequestError, match=r"does not multiply int8.* use a bundle in fp16"):
        choose(in_precision(opened, "int8"), "cuda")
    assert choose(in_precision(opened, "int8"), "auto").executor == "cpu"


def test_the_budget_is_what_is_free_or_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Driver(), Nvml())
    assert budget(None) == 20 * GIB - (256 << 20)
    assert budget(8 * GIB) == 8 * GIB
    install(monkeypatch, Driver(), None)  # where the driver does not tell, all of it
    assert budget(None) == 24 * GIB - (256 << 20)


def test_a_budget_is_nothing_to_the_cpu(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install(monkeypatch, None)
    with pytest.raises(RequestError, match=r"vram is a budget for .* no NVIDIA driver"):
        Pipeline.from_bundle(opened.root, vram=8 * GIB)
    with pytest.raises(RequestError, match=r"the cpu executor has none$"):
        Pipeline.from_bundle(opened.root, "cpu", vram=8 * GIB)


def test_an_unknown_executor_is_told_which_there_are(opened: Bundle) -> None:
    with pytest.raises(RequestError, match=r"'abacus' is unknown; choose one of auto, cpu, .*cuda"):
        choose(opened, "abacus")
