"""Which executor generates, and why: never a silent one. The driver is a stand-in that answers as NVIDIA's does."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
from facts import assert_facts, raises_with
from gpu_stand_in import GIB, Card, install_gpus, remove_driver

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import RequestError
from zimage_runtime.executors.choose import ExecutorChoice
from zimage_runtime.executors.ort import cuda
from zimage_runtime.executors.ort.cuda import budget_of
from zimage_runtime.executors.ort.cuda_package import SWAP_TO_GPU
from zimage_runtime.executors.protocol import Options
from zimage_runtime.machine.gpus import find_gpu
from zimage_runtime.pipeline import Pipeline, Request


def choose(bundle: Bundle, asked: str) -> ExecutorChoice:
    choice = ExecutorChoice(bundle, asked)
    choice.open()
    return choice


def name_of(choice: ExecutorChoice) -> str:
    return choice.open().name


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


@pytest.mark.parametrize(
    ("break_it", "facts"),
    [
        (remove_driver, ["no NVIDIA driver"]),
        (lambda monkeypatch: install_gpus(monkeypatch), ["no GPU"]),
        (lambda monkeypatch: install_gpus(monkeypatch, Card(), cuda_status=999), ["NVIDIA driver", "error 999"]),
    ],
)
def test_what_is_wrong_with_the_driver_is_said(
    monkeypatch: pytest.MonkeyPatch, opened: Bundle, break_it: Callable[[pytest.MonkeyPatch], object], facts: list[str]
) -> None:
    break_it(monkeypatch)
    choice = choose(opened, "auto")
    assert name_of(choice) == "cpu"
    assert_facts(choice.why, *facts)
    with raises_with(RequestError, "'cuda'", *facts, "`zimage-rt doctor`", "--executor cpu"):
        choose(opened, "cuda")


def test_cuda_is_chosen_where_all_is_there(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card())
    with_gpu_package(monkeypatch)
    assert name_of(choose(opened, "auto")) == "cuda"
    assert choose(opened, "auto").open().device_name == "NVIDIA GeForce RTX 4090 (compute capability 8.9)"
    assert name_of(choose(opened, "cuda")) == "cuda"
    assert name_of(choose(opened, "cpu")) == "cpu"
    assert Pipeline.from_bundle(opened.root).executor.name == "cuda"


def test_another_gpu_is_used_where_it_is_named(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card(), Card(name="NVIDIA A100", capability=(8, 0)))
    with_gpu_package(monkeypatch)
    executor = ExecutorChoice(opened, "cuda", Options(device=1)).open()
    assert executor.device_name.startswith("NVIDIA A100")
    assert executor.device.index == 1  # type: ignore[attr-defined]
    with raises_with(RequestError, "GPU 2", "0 is NVIDIA GeForce RTX 4090", "1 is NVIDIA A100"):
        ExecutorChoice(opened, "cuda", Options(device=2)).open()


def test_a_gpu_without_its_package_names_the_commands(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card())
    choice = choose(opened, "auto")
    assert name_of(choice) == "cpu"
    commands = [f"`{command}`" for command in SWAP_TO_GPU]
    assert_facts(choice.why, *commands)
    with raises_with(RequestError, "'cuda'", *commands):
        choose(opened, "cuda")


def test_a_provider_that_appears_with_its_libraries_is_found(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card())
    monkeypatch.setattr(cuda, "preload_libraries", lambda: with_gpu_package(monkeypatch))
    assert name_of(choose(opened, "auto")) == "cuda"


def test_bf16_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card(capability=(7, 5)))
    with_gpu_package(monkeypatch)
    with raises_with(RequestError, "7.5", "fp16"):
        choose(in_precision(opened, "bf16"), "cuda")
    for precision in ("fp16", "fp32"):
        assert name_of(choose(in_precision(opened, precision), "auto")) == "cuda"
    install_gpus(monkeypatch, Card(capability=(8, 0)))
    assert name_of(choose(in_precision(opened, "bf16"), "auto")) == "cuda"


def test_int8_needs_a_gpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card(capability=(6, 0)))
    with_gpu_package(monkeypatch)
    with raises_with(RequestError, "int8", "6.1", "fp16"):
        choose(in_precision(opened, "int8"), "cuda")
    assert name_of(choose(in_precision(opened, "int8"), "auto")) == "cpu"


def test_the_budget_is_what_is_free_or_what_is_given(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card())
    with_gpu_package(monkeypatch)
    assert budget_of(find_gpu()) == 20 * GIB - (256 << 20)
    for vram, budget in ((None, 20 * GIB - (256 << 20)), (8 * GIB, 8 * GIB)):
        assert ExecutorChoice(opened, "cuda", Options(vram=vram)).open().budget == budget  # type: ignore[attr-defined]


def test_a_budget_is_nothing_to_the_cpu(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    remove_driver(monkeypatch)
    with raises_with(RequestError, "vram", "GPU", "cpu", "no NVIDIA driver"):
        Pipeline.from_bundle(opened.root, vram=8 * GIB)
    with raises_with(RequestError, "vram", "GPU", "cpu") as refusal:
        Pipeline.from_bundle(opened.root, "cpu", vram=8 * GIB)
    assert "driver" not in str(refusal.value), "which has nothing to do with it"


def test_a_gpus_number_is_nothing_to_the_cpu(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    remove_driver(monkeypatch)
    with raises_with(RequestError, "device", 7, "GPU", "cpu"):
        Pipeline.from_bundle(opened.root, "cpu", device=7)
    with Pipeline.from_bundle(opened.root, device=7) as pipeline:  # which says that it uses the CPU, and why
        assert pipeline.executor.name == "cpu"


def test_an_unknown_executor_names_those_that_exist(opened: Bundle) -> None:
    with raises_with(RequestError, "'abacus'", "auto", "tensorrt", "cuda", "cpu"):
        choose(opened, "abacus")


def test_a_gpu_executor_that_is_not_the_best_one_is_no_warning(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    """Most bundles have no block programs for TensorRT: that CUDA runs them is what one expects."""
    install_gpus(monkeypatch, Card())
    with_gpu_package(monkeypatch)
    with Pipeline.from_bundle(opened.root) as pipeline:
        job = pipeline.prepare(Request("a fox", size=(64, 64), steps=1))
    assert job.executor.name == "cuda"
    assert job.choice is not None
    assert "no tensorrt" in job.choice
    assert job.notices == ()
