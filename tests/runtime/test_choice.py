"""Which executor generates, and why: never a silent one. The driver is a stand-in that answers as NVIDIA's does."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
from gpu_stand_in import GIB, Card, install_gpus, remove_driver

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import RequestError
from zimage_runtime.executors.choose import SWAP_TO_GPU, budget, choose, make_executor
from zimage_runtime.executors.ort import device as ort_cuda
from zimage_runtime.pipeline import Pipeline


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
    ("break_it", "said"),
    [
        (remove_driver, "no NVIDIA driver found"),
        (lambda monkeypatch: install_gpus(monkeypatch), "no GPU"),
        (lambda monkeypatch: install_gpus(monkeypatch, Card(), cuda_status=999), "unknown error (error 999)"),
    ],
)
def test_what_is_wrong_with_the_driver_is_said(
    monkeypatch: pytest.MonkeyPatch, opened: Bundle, break_it: Callable[[pytest.MonkeyPatch], object], said: str
) -> None:
    break_it(monkeypatch)
    choice = choose(opened, "auto")
    assert choice.executor == "cpu"
    assert said in choice.why
    with pytest.raises(RequestError) as refusal:
        choose(opened, "cuda")
    assert "executor 'cuda' cannot run here" in str(refusal.value)
    assert said in str(refusal.value)


def test_cuda_is_chosen_where_all_is_there(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card())
    with_gpu_package(monkeypatch)
    choice = choose(opened, "auto")
    assert choice.executor == "cuda"
    assert choice.why.endswith("NVIDIA GeForce RTX 4090 (compute capability 8.9) is there")
    assert make_executor(opened, choice, None).name == "cuda"
    assert choose(opened, "cuda").why == "asked for"
    assert choose(opened, "cpu").executor == "cpu"
    assert Pipeline.from_bundle(opened.root).executor.name == "cuda"


def test_a_gpu_without_its_package_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card())
    choice = choose(opened, "auto")
    assert choice.executor == "cpu"
    for command in SWAP_TO_GPU:
        assert f"`{command}`" in choice.why
    with pytest.raises(RequestError) as refusal:
        choose(opened, "cuda")
    for command in SWAP_TO_GPU:
        assert f"`{command}`" in str(refusal.value)


def test_a_provider_that_appears_with_its_libraries_is_found(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card())
    monkeypatch.setattr(ort_cuda, "preload_libraries", lambda: with_gpu_package(monkeypatch))
    assert choose(opened, "auto").executor == "cuda"


def test_bf16_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card(capability=(7, 5)))
    with_gpu_package(monkeypatch)
    with pytest.raises(RequestError, match=r"7\.5.* fp16"):
        choose(in_precision(opened, "bf16"), "cuda")
    for precision in ("fp16", "fp32"):
        assert choose(in_precision(opened, precision), "auto").executor == "cuda"
    install_gpus(monkeypatch, Card(capability=(8, 0)))
    assert choose(in_precision(opened, "bf16"), "auto").executor == "cuda"


def test_int8_needs_a_gpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    install_gpus(monkeypatch, Card(capability=(6, 0)))
    with_gpu_package(monkeypatch)
    with pytest.raises(RequestError, match=r"does not multiply int8.* use a bundle in fp16"):
        choose(in_precision(opened, "int8"), "cuda")
    assert choose(in_precision(opened, "int8"), "auto").executor == "cpu"


def test_the_budget_is_what_is_free_or_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, Card())
    assert budget(None) == 20 * GIB - (256 << 20)
    assert budget(8 * GIB) == 8 * GIB


def test_a_budget_is_nothing_to_the_cpu(monkeypatch: pytest.MonkeyPatch, opened: Bundle) -> None:
    remove_driver(monkeypatch)
    with pytest.raises(RequestError, match=r"vram is a budget for .* no NVIDIA driver"):
        Pipeline.from_bundle(opened.root, vram=8 * GIB)
    with pytest.raises(RequestError, match=r"the cpu executor has none$"):
        Pipeline.from_bundle(opened.root, "cpu", vram=8 * GIB)


def test_an_unknown_executor_is_told_which_there_are(opened: Bundle) -> None:
    with pytest.raises(RequestError, match=r"'abacus' is unknown; choose one of auto, cpu, .*cuda"):
        choose(opened, "abacus")
