"""The GPUs of a machine: as many as CUDA shows, numbered as CUDA numbers them, described by NVML."""

import ctypes
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil
import pynvml
import pytest
from facts import assert_facts, raises_with
from gpu_stand_in import GIB, Card, install_gpus, process, remove_driver

from zimage_runtime.errors import ExecutorError
from zimage_runtime.machine import cuda_driver, gpus
from zimage_runtime.machine.gpu_monitor import GpuMonitor, open_monitor
from zimage_runtime.machine.gpus import Gpu, find_gpu, list_gpus, memory_of_this_process
from zimage_runtime.machine.nvml import NOT_LISTED, Unmeasured

OLD = Card("NVIDIA GeForce GTX 1080", (6, 1), 8 * GIB, 7 * GIB, id=uuid.UUID(int=1))
NEW = Card(id=uuid.UUID(int=2))


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install_gpus(monkeypatch, NEW)
    gpu = find_gpu()
    assert gpu == Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 * GIB, 20 * GIB, "13.2", "580.65.06", 0, f"GPU-{NEW.id}")
    assert str(gpu) == "NVIDIA GeForce RTX 4090 (compute capability 8.9)"
    assert gpu.has_bf16
    assert nvml.sessions == 0, "NVML is closed again"


def test_gpus_are_in_cudas_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest first, where NVML goes by their places on the bus."""
    install_gpus(monkeypatch, OLD, NEW, cuda=[1, 0])
    assert [(gpu.index, gpu.name) for gpu in list_gpus()] == [(0, NEW.name), (1, OLD.name)]
    assert find_gpu(1).total == 8 * GIB
    assert not find_gpu(1).has_bf16


def test_a_gpu_that_cuda_hides_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA_VISIBLE_DEVICES does, by index or by id."""
    install_gpus(monkeypatch, OLD, NEW, cuda=[1])
    assert [gpu.name for gpu in list_gpus()] == [NEW.name]


@pytest.mark.parametrize("index", [2, -1])
def test_a_gpu_that_does_not_exist(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, OLD, NEW)
    with pytest.raises(ExecutorError) as refusal:
        find_gpu(index)
    for fact in (f"GPU {index} ", "2", OLD.name, NEW.name):
        assert fact in str(refusal.value)


def test_a_slice_of_a_partitioned_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has an id, a name and memory of its own, and the whole GPU's compute capability."""
    whole = Card("NVIDIA H100", (9, 0), 80 * GIB, 70 * GIB)
    part = Card("NVIDIA H100 MIG 1g.10gb", pynvml.NVMLError_InvalidArgument(), 10 * GIB, 9 * GIB, slice=True)
    install_gpus(monkeypatch, whole, part, cuda=[1])
    (gpu,) = list_gpus()
    assert (gpu.name, gpu.capability, gpu.total, gpu.uuid) == (part.name, (9, 0), 10 * GIB, f"MIG-{part.id}")


def test_a_gpu_that_shares_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """DGX Spark: NVML answers "Not Supported"."""
    shared = Card("NVIDIA GB10", (12, 1), answers={"nvmlDeviceGetMemoryInfo": pynvml.NVMLError_NotSupported()})
    install_gpus(monkeypatch, shared)
    monkeypatch.setattr(gpus, "available_memory", lambda: 100 * GIB)
    gpu = find_gpu()
    assert (gpu.total, gpu.free) == (psutil.virtual_memory().total, 100 * GIB)


@pytest.mark.parametrize(
    ("nvml_error", "cuda_status", "facts"),
    [
        (pynvml.NVMLError_DriverNotLoaded(), 0, ["driver", "loaded"]),
        (pynvml.NVMLError_LibRmVersionMismatch(), 0, ["driver", "version mismatch"]),
        (None, 100, ["driver", "no GPU"]),
        (None, 999, ["driver", "error 999"]),
        (None, 803, ["driver", "unsupported display driver", "error 803"]),
    ],
)
def test_what_is_wrong_is_said(
    nvml_error: Exception | None, cuda_status: int, facts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpus(monkeypatch, NEW, nvml_error=nvml_error, cuda_status=cuda_status)
    for look in (list_gpus, find_gpu):
        with raises_with(ExecutorError, *facts):
            look()
    assert memory_of_this_process() is None


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    remove_driver(monkeypatch)
    with raises_with(ExecutorError, "no NVIDIA driver"):
        find_gpu()
    monitor = open_monitor()
    assert isinstance(monitor, Unmeasured)
    assert_facts(monitor.reason, "no NVIDIA driver")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with raises_with(ExecutorError, "`pip install nvidia-ml-py`"):
        find_gpu()


def test_a_container_with_half_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA_DRIVER_CAPABILITIES decides which of its libraries are mounted."""
    install_gpus(monkeypatch, NEW, nvml_error=pynvml.NVMLError_LibraryNotFound())
    with raises_with(ExecutorError, "NVML", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"):
        find_gpu()
    remove_driver(monkeypatch)
    no_cuda = cuda_driver._load
    install_gpus(monkeypatch, NEW)
    monkeypatch.setattr(cuda_driver, "_load", no_cuda)
    with raises_with(ExecutorError, "libcuda.so.1", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"):
        find_gpu()


def test_no_gpu_names_the_variable_that_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, NEW, cuda=[])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with raises_with(ExecutorError, "no GPU") as refusal:
        find_gpu()
    assert "CUDA_VISIBLE_DEVICES" not in str(refusal.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with raises_with(ExecutorError, "no GPU", "CUDA_VISIBLE_DEVICES", "'7'"):
        find_gpu()


def test_an_old_driver_has_the_older_question_for_the_id() -> None:
    """Before CUDA 11.4. The answer is a CUuuid of cuda.h: 16 bytes, and no more."""
    written: list[int] = []

    class Driver:
        def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
            return 0

        def cuDeviceGetUuid(self, found: Any, device: Any) -> int:  # noqa: N802
            written.append(ctypes.sizeof(found._obj))
            found._obj[:] = list(NEW.id.bytes)
            return 0

    assert cuda_driver._device_id(Driver(), 0) == NEW.id
    assert written == [16]


# what processes hold


def test_a_process_holds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(processes=[process(1, 5), process(42, 3 * GIB)])
    nvml = install_gpus(monkeypatch, OLD, card, cuda=[1, 0])
    assert find_gpu(0).used_by(42) == 3 * GIB
    assert find_gpu(1).used_by(42) == NOT_LISTED
    assert nvml.sessions == 0


def test_a_process_that_computes_and_draws_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, Card(processes=[process(42, 300)], graphics=[process(42, 300), process(1, 900)]))
    assert find_gpu().used_by(42) == 300


@pytest.mark.parametrize(
    ("processes", "facts"),
    [
        ([process(1, 5)], [NOT_LISTED.reason]),  # a container: NVML lists the host's ids
        ([process(42, None)], ["NVML", "memory", "GPU"]),  # NVML_VALUE_NOT_AVAILABLE
        (pynvml.NVMLError_NoPermission(), ["NVML", "Insufficient Permissions"]),
    ],
)
def test_memory_that_nvml_does_not_report(processes: Any, facts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, Card(processes=processes))
    for found in (find_gpu().used_by(42), GpuMonitor(find_gpu()).process_memory(42)):
        assert isinstance(found, Unmeasured)
        assert_facts(found.reason, *facts)
        assert (found is NOT_LISTED) == (facts == [NOT_LISTED.reason])


def test_a_driver_that_is_lost_later_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, NEW)
    gpu = find_gpu()
    install_gpus(monkeypatch, NEW, nvml_error=pynvml.NVMLError_Unknown())
    assert isinstance(gpu.used_by(42), Unmeasured)
    install_gpus(monkeypatch, OLD)
    assert isinstance(gpu.used_by(42), Unmeasured)
    with raises_with(ExecutorError, NEW.name):
        GpuMonitor(gpu)


@pytest.mark.parametrize(
    ("processes", "namespace", "held"),
    [
        ([process(os.getpid(), 3 * GIB)], "pid:[4026531836]", 3 * GIB),
        ([process(os.getpid(), 3 * GIB)], "pid:[4026532999]", 3 * GIB),
        ([], "pid:[4026531836]", 0),  # the host's own ids: a process that is not listed holds nothing
        ([], "pid:[4026532999]", None),  # a container's
        ([], None, None),  # not Linux
        ([process(os.getpid(), None)], "pid:[4026531836]", None),
    ],
)
def test_memory_of_this_process(
    processes: Any, namespace: str | None, held: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpus(monkeypatch, OLD, Card(processes=processes))
    link = tmp_path / "pid"
    if namespace:
        link.symlink_to(namespace)
    monkeypatch.setattr(gpus, "_PROCESS_IDS", link)
    assert memory_of_this_process(1) == held
    assert memory_of_this_process(2) is None, "there is no such GPU"


# what changes


def test_a_monitor_leaves_out_what_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(
        answers={
            "nvmlDeviceGetPowerUsage": 250_000,
            "nvmlDeviceGetClockInfo": pynvml.NVMLError_NotSupported(),
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetEnforcedPowerLimit": pynvml.NVMLError_NotSupported(),
            "nvmlDeviceGetTotalEnergyConsumption": 1500,
        }
    )
    nvml = install_gpus(monkeypatch, card)
    monitor = open_monitor()
    assert isinstance(monitor, GpuMonitor)
    with monitor:
        assert nvml.sessions == 1
        assert monitor.state() == {"gpu_power_watts": 250.0, "gpu_temperature_celsius": 61}
        assert monitor.energy() == 1.5
        assert monitor.used_memory() == 4 * GIB
        assert monitor.description() == {
            "name": card.name,
            "memory_bytes": 24 * GIB,
            "driver": "580.65.06",
            "cuda": "13.2",
            "power_limit_watts": None,
        }
        card.answers["nvmlDeviceGetTotalEnergyConsumption"] = pynvml.NVMLError_GpuIsLost()
        lost = monitor.energy()
        assert isinstance(lost, Unmeasured)
        assert_facts(lost.reason, "NVML", "GPU is lost")
    assert nvml.sessions == 0


@pytest.mark.gpu
def test_this_machines_gpu() -> None:
    """CUDA and NVML speak of the same GPU, and this process's memory on it is known or unknown, never negative."""
    try:
        gpu = find_gpu()
    except ExecutorError as error:
        pytest.skip(str(error))
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        assert (gpu.name, gpu.capability) == (torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))
        assert len(list_gpus()) == torch.cuda.device_count()
        kept = torch.zeros(GIB, dtype=torch.uint8, device="cuda")
        held = memory_of_this_process()
        assert held is None or held >= kept.numel()
    assert 0 < gpu.free <= gpu.total
