"""A driver, a GPU or a package that is too old for the others is named, with what would do. No driver is real."""

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from facts import assert_facts, raises_with
from gpu_stand_in import GIB, Card, install_gpus
from onnxruntime.capi import build_and_package_info

from zimage_rt.commands import doctor
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import ExecutorError, RequestError
from zimage_runtime.executors.choose import ExecutorChoice
from zimage_runtime.executors.examination import Verdict
from zimage_runtime.executors.ort import cuda
from zimage_runtime.executors.ort.cuda import cuda_executor
from zimage_runtime.executors.ort.cuda_package import SWAP_TO_CUDA_12, SWAP_TO_GPU, built_for_cuda
from zimage_runtime.executors.ort.known_answer import known_answer
from zimage_runtime.executors.protocol import Work
from zimage_runtime.executors.tensorrt import kind as tensorrt
from zimage_runtime.machine import cuda_versions
from zimage_runtime.machine.cuda_versions import why_old_driver
from zimage_runtime.machine.gpus import find_gpu
from zimage_runtime.model.geometry import image_geometry

OLD_DRIVER: dict[str, Any] = {"driver": "572.16", "driver_cuda": 12080}
OLD_GPU = Card("Quadro P4000", (6, 1), 8 * GIB, 7 * GIB)
VOLTA = Card("Tesla V100", (7, 0), 16 * GIB, 15 * GIB)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


def package(monkeypatch: pytest.MonkeyPatch, version: str, cuda_version: str | None) -> None:
    """The ONNX Runtime that is installed: as if it were the package for the GPU."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(build_and_package_info, "cuda_version", cuda_version, raising=False)


def refusal(opened: Bundle, *facts: object) -> str:
    with raises_with(RequestError, "'cuda'", *facts) as caught:
        ExecutorChoice(opened, "cuda").open()
    return str(caught.value)


def test_a_driver_for_cuda_12_cannot_run_a_package_for_cuda_13(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card(), **OLD_DRIVER)
    package(monkeypatch, "1.31.1", "13.0")
    commands = [f"`{command}`" for command in SWAP_TO_CUDA_12]
    refusal(opened, "572.16", "12.8", "CUDA 13", "onnxruntime-gpu 1.31.1", "580", *commands)
    choice = ExecutorChoice(opened)
    assert choice.open().name == "cpu"
    assert_facts(choice.why, "572.16", "580")
    examined = doctor.check_executor("cuda")
    assert examined.verdict is Verdict.PROBLEM
    assert_facts(examined.text, "572.16", "CUDA 13", "580")


def test_packages_and_drivers_that_suit_each_other(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    for version, built_for, driver in (
        ("1.26.0", "12.8", OLD_DRIVER),
        ("1.26.0", "12.8", {}),
        ("1.31.1", "13.0", {}),
        ("1.31.1", None, OLD_DRIVER),  # a package that does not say: its own error will
    ):
        install_gpus(monkeypatch, Card(), **driver)
        package(monkeypatch, version, built_for)
        assert ExecutorChoice(opened, "cuda").open().name == "cuda"


def test_a_driver_older_than_cuda_12_is_not_offered_a_package_for_it(
    monkeypatch: pytest.MonkeyPatch, opened: Bundle
) -> None:
    install_gpus(monkeypatch, Card(), driver="470.57", driver_cuda=11040)
    package(monkeypatch, "1.26.0", "12.8")
    assert "pip" not in refusal(opened, "470.57", "11.4", "CUDA 12", "525").partition("zimage-rt")[0]
    gpu = find_gpu()
    unknown = why_old_driver(gpu, 14, "a package")
    assert unknown is not None
    assert_facts(unknown, "470.57", "CUDA 14")
    assert why_old_driver(gpu, 11, "a package") is None


def test_a_package_without_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    """Without them, attention would run on the CPU, with copies, and nothing would say so."""
    install_gpus(monkeypatch, Card())
    package(monkeypatch, "1.25.1", "12.8")
    refusal(opened, "onnxruntime-gpu 1.25.1", "1.26", *(f"`{command}`" for command in SWAP_TO_GPU))
    assert doctor.check_executor("cuda").verdict is Verdict.PROBLEM
    install_gpus(monkeypatch, Card(), **OLD_DRIVER)
    refusal(opened, "1.26", *(f"`{command}`" for command in SWAP_TO_CUDA_12))


def test_a_gpu_that_cuda_13_dropped(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    for card in (OLD_GPU, VOLTA):
        install_gpus(monkeypatch, card)
        package(monkeypatch, "1.31.1", "13.0")
        refusal(opened, card.name, "7.5", "CUDA 13", "onnxruntime-gpu 1.31.1", *(f"`{c}`" for c in SWAP_TO_CUDA_12))
        package(monkeypatch, "1.26.0", "12.8")
        assert ExecutorChoice(opened, "cuda").open().name == "cuda"
    install_gpus(monkeypatch, Card("Tesla T4", (7, 5)))
    package(monkeypatch, "1.31.1", "13.0")
    assert ExecutorChoice(opened, "cuda").open().name == "cuda"


def test_the_package_for_the_cpu_is_swapped_for_one_that_the_driver_runs(
    monkeypatch: pytest.MonkeyPatch, opened: Bundle
) -> None:
    install_gpus(monkeypatch, Card(), **OLD_DRIVER)
    refusal(opened, *(f"`{command}`" for command in SWAP_TO_CUDA_12))
    install_gpus(monkeypatch, Card())
    refusal(opened, *(f"`{command}`" for command in SWAP_TO_GPU))


def test_doctor_names_the_driver_that_installed_packages_need(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime-gpu": "1.31.1", "cuda-bindings": "13.5.0"}
    monkeypatch.setattr(doctor, "_installed", versions.get)
    package(monkeypatch, "1.31.1", "13.0")
    install_gpus(monkeypatch, Card(), **OLD_DRIVER)
    finding = doctor.check_gpus("gpu")
    assert finding.verdict is Verdict.NOTE
    assert_facts(finding.text, "572.16", "onnxruntime-gpu 1.31.1", "cuda-bindings 13.5.0", "580")
    install_gpus(monkeypatch, Card())
    assert doctor.check_gpus("gpu").verdict is Verdict.OK
    versions.clear()
    install_gpus(monkeypatch, Card(), **OLD_DRIVER)
    assert doctor.check_gpus("gpu").verdict is Verdict.OK, "nothing here needs more"


def test_tensorrt_names_the_driver_that_its_bindings_need(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    """CUDA itself finds no GPU then, and would say that there is none."""
    monkeypatch.setattr(cuda_versions, "version", lambda package: "13.5.0")
    install_gpus(monkeypatch, Card(), **OLD_DRIVER)
    found = tensorrt.why_unavailable(opened, 0)
    assert found is not None
    assert_facts(found.reason, "572.16", "CUDA 13", "cuda-bindings 13.5.0", "580")
    assert not found.of_machine, "a newer driver cures it"

    def no_gpu(index: int = 0) -> Any:
        raise ExecutorError("no GPU")  # as with cudaErrorInsufficientDriver

    monkeypatch.setattr(tensorrt, "CudaDevice", no_gpu)
    examined = doctor.check_executor("tensorrt")
    assert examined.verdict is Verdict.PROBLEM
    assert_facts(examined.text, "572.16", "580")
    install_gpus(monkeypatch, Card())
    assert doctor.check_executor("tensorrt").verdict is Verdict.NOTE
    install_gpus(monkeypatch, Card(), **OLD_DRIVER)
    for answer in (lambda package: "12.9.1", missing):
        monkeypatch.setattr(cuda_versions, "version", answer)
        assert cuda_versions.why_old_for_bindings(find_gpu()) is None


def missing(package: str) -> str:
    raise PackageNotFoundError(package)


def test_the_package_says_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, major in (("13.0", 13), ("12.8", 12), ("", None), (None, None)):
        monkeypatch.setattr(build_and_package_info, "cuda_version", text, raising=False)
        assert built_for_cuda() == major


def test_libraries_are_loaded_before_the_first_use_whatever_it_is(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding in tiles copies a convolution's weights to the GPU before there is a session."""
    done: list[str] = []

    def preload() -> str:
        done.append("preload")
        return ""

    def copy(*arguments: Any) -> Any:
        done.append("copy")
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(cuda, "preload_libraries", preload)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", copy)
    one = cuda_executor(Bundle.open(bundle), budget=8 * GIB)
    plan = one.plan(Work(geometry=image_geometry(64, 64, one.bundle.manifest.config), tokens=2))
    zeros = np.zeros((1, 1, 3, 3), np.float32)
    with one.session(plan) as session, raises_with(ExecutorError, "GPU"):
        session.tile_kernels().plain(SimpleNamespace(weight=zeros, bias=zeros[0, 0, 0]))  # type: ignore[attr-defined]
    assert done == ["preload", "copy"]


def test_the_known_answer_comes_after_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, Card())
    package(monkeypatch, "1.31.1", "13.0")
    done: list[str] = []

    def answer(providers: list[str], **options: Any) -> Any:
        done.append("session")
        return known_answer(["CPUExecutionProvider"])

    monkeypatch.setattr(cuda, "preload_libraries", lambda: done.append("preload") or "")
    monkeypatch.setattr(cuda, "known_answer", answer)
    doctor.check_executor("cuda")
    assert done == ["preload", "session"]


def test_fp16_sums_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_preloaded", False)
    monkeypatch.setenv(cuda.WIDE_SUMS[0], "")  # so that it is restored
    monkeypatch.delenv(cuda.WIDE_SUMS[0])
    cuda.preload_libraries()
    assert os.environ[cuda.WIDE_SUMS[0]] == "2"
    monkeypatch.setattr(cuda, "_preloaded", False)
    monkeypatch.setenv(cuda.WIDE_SUMS[0], "4")
    cuda.preload_libraries()
    assert os.environ[cuda.WIDE_SUMS[0]] == "4", "the user's own choice stays"
