"""GPUs that do not exist: NVIDIA's two libraries answer for them, NVML through the real ``pynvml`` and its errors."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from zimage_runtime.errors import ExecutorError
from zimage_runtime.executors.ort import webgpu
from zimage_runtime.machine import cuda_driver

GIB = 1 << 30


@dataclass
class Card:
    """One GPU. An answer that is an exception is raised."""

    name: str = "NVIDIA GeForce RTX 4090"
    capability: Any = (8, 9)
    total: int = 24 * GIB
    free: int = 20 * GIB
    id: uuid.UUID = field(default_factory=uuid.uuid4)
    processes: Any = field(default_factory=list)  # of `process`
    graphics: Any = field(default_factory=list)  # those of them that draw on a screen
    slice: bool = False  # of the card before it, partitioned (MIG)
    answers: dict[str, Any] = field(default_factory=dict)  # of other functions of NVML, by name

    @property
    def uuid(self) -> str:
        return f"{'MIG' if self.slice else 'GPU'}-{self.id}"


def process(pid: int, used: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


class Cuda:
    """``libcuda``, as far as it is asked."""

    def __init__(self, ids: Sequence[uuid.UUID], init: int) -> None:
        self.ids, self.init = ids, init

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"unknown error" if status == 999 else b"system has unsupported display driver"
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.ids)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = number
        return 0

    def cuDeviceGetUuid_v2(self, found: Any, device: Any) -> int:  # noqa: N802
        found._obj[:] = list(self.ids[device.value].bytes)
        return 0


class Nvml:
    """NVML of some cards, in the order of their places on the bus. `sessions` counts those that are open."""

    def __init__(self, cards: Sequence[Card], init: Exception | None, driver: str, cuda: int) -> None:
        self.cards, self.init, self.driver, self.cuda = cards, init, driver, cuda
        self.sessions = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = [card for card in self.cards if not card.slice]

        def by_uuid(name: str) -> Card:
            for card in self.cards:
                if card.uuid == name:
                    return card
            raise pynvml.NVMLError_NotFound

        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": self._start,
            "nvmlShutdown": self._stop,
            "nvmlDeviceGetCount": lambda: len(whole),
            "nvmlDeviceGetHandleByIndex": lambda index: whole[index],
            "nvmlDeviceGetHandleByUUID": by_uuid,
            "nvmlDeviceGetUUID": lambda card: card.uuid,
            "nvmlDeviceGetName": lambda card: card.name,
            "nvmlDeviceGetCudaComputeCapability": lambda card: given(card.capability),
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda card: self.cards[self.cards.index(card) - 1],
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetComputeRunningProcesses": lambda card: given(card.processes),
            "nvmlDeviceGetGraphicsRunningProcesses": lambda card: given(card.graphics),
            "nvmlSystemGetDriverVersion": lambda: self.driver,
            "nvmlSystemGetCudaDriverVersion_v2": lambda: self.cuda,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, self._while_open(answer) if "Get" in name else answer)
        for name in {name for card in self.cards for name in card.answers}:
            monkeypatch.setattr(pynvml, name, self._while_open(lambda card, *_, name=name: given(card.answers[name])))

    def _start(self) -> None:
        if self.init:
            raise self.init
        self.sessions += 1

    def _stop(self) -> None:
        self.sessions -= 1

    def _while_open(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            if not self.sessions:
                raise pynvml.NVMLError_Uninitialized
            return answer(*arguments)

        return ask


def given(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


def memory(card: Card) -> Any:
    if "nvmlDeviceGetMemoryInfo" in card.answers:
        return given(card.answers["nvmlDeviceGetMemoryInfo"])
    return SimpleNamespace(total=card.total, free=card.free, used=card.total - card.free)


def install_gpus(
    monkeypatch: pytest.MonkeyPatch,
    *cards: Card,
    cuda: Sequence[int] | None = None,
    cuda_status: int = 0,
    nvml_error: Exception | None = None,
    driver: str = "580.65.06",
    driver_cuda: int = 13020,
) -> Nvml:
    """A machine with these GPUs. `cuda` lists which of them CUDA shows and in which order, by default all as they are;
    `cuda_status` is what its start returns, `nvml_error` what NVML's raises, `driver_cuda` the newest CUDA of the
    driver, 13020 for 13.2."""
    ids = [card.id for card in cards] if cuda is None else [cards[number].id for number in cuda]
    monkeypatch.setattr(cuda_driver, "_load", lambda library: Cuda(ids, cuda_status))
    nvml = Nvml(cards, nvml_error, driver, driver_cuda)
    nvml.install(monkeypatch)
    return nvml


def remove_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without NVIDIA's driver and without Vulkan's, whatever this one has."""

    def load(library: str) -> Any:
        raise OSError(f"{library}: cannot open shared object file")

    install_gpus(monkeypatch, nvml_error=pynvml.NVMLError_LibraryNotFound())
    monkeypatch.setattr(cuda_driver, "_load", load)
    monkeypatch.setattr(webgpu, "find_adapter", no_adapter)


def no_adapter() -> Any:
    raise ExecutorError("no Vulkan driver found")
