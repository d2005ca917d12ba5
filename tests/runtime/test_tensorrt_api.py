"""What we ask of TensorRT and of CUDA, and what their refusals become. Modules that answer stand in for a GPU."""

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from facts import assert_facts, raises_with

from zimage_runtime.errors import DeviceLostError, ExecutorError
from zimage_runtime.executors.tensorrt import cuda, trt_api
from zimage_runtime.executors.tensorrt.cuda import CudaDevice
from zimage_runtime.executors.tensorrt.device import OutOfDeviceMemoryError, PinnedMemoryError
from zimage_runtime.executors.tensorrt.trt_api import FULL, RTX, EngineRuntime, Library, TensorRtContext, library_for

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")


def rtx() -> Any:
    import tensorrt_rtx

    return tensorrt_rtx


def other(name: str, **attributes: object) -> ModuleType:
    """TensorRT's module under another name, or of another version."""
    module = ModuleType(name)
    vars(module).update({key: value for key, value in vars(rtx()).items() if key != "__name__"} | attributes)
    return module


def installed(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    known = {module.__name__: module for module in modules}

    def import_module(name: str) -> ModuleType:
        if name not in known:
            raise ImportError(name)
        return known[name]

    monkeypatch.setattr(trt_api, "import_module", import_module)


# Which GPUs


def test_tensorrt_for_rtx_serves_a_list_of_gpus() -> None:
    served = [(7, 5), (8, 6), (8, 9), (12, 0), (12, 1)]
    asked = [*served, (7, 0), (8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0)]
    assert [capability for capability in asked if Library(rtx()).serves(capability)] == served
    before_spark = other(RTX, ComputeCapability=SimpleNamespace(SM120=1))
    assert not Library(before_spark).serves((12, 1)), "the version must have it"
    assert Library(other(FULL)).serves((9, 0))


def test_the_package_that_serves_the_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    both = rtx(), other(FULL, __version__="11.0")
    installed(monkeypatch, *both)
    assert [library_for(capability).name for capability in ((8, 9), (9, 0), (8, 0))] == [RTX, FULL, FULL]
    installed(monkeypatch, both[0])
    for capability, text in (((9, 0), "9.0"), ((8, 0), "8.0"), ((10, 0), "10.0")):
        with raises_with(ExecutorError, text, RTX, "--executor cuda", "`pip install tensorrt`"):
            library_for(capability)
    installed(monkeypatch)
    with raises_with(ExecutorError, "pip install 'zimage-rt[tensorrt]'"):
        library_for((8, 9))


# Engines


def test_an_engine_that_does_not_fit_is_refused_with_the_librarys_reason() -> None:
    """Its header is enough. This is the library's own judgement, which takes no GPU."""
    runtime = EngineRuntime(Library(rtx()))
    assert runtime.load(b"no engine at all".ljust(100, b"\0")) is None
    assert_facts(runtime.last_error(), "malformed engine")


@pytest.mark.parametrize(
    ("diagnostics", "facts"), [(2, ["unsupported cc"]), (5, ["version mismatch", "old cuda driver"]), (0, ["invalid"])]
)
def test_each_reason_is_in_words(diagnostics: int, facts: list[str]) -> None:
    runtime = EngineRuntime(Library(rtx()))
    seen: list[bytes] = []

    def judge(header: bytes) -> tuple[Any, int]:
        seen.append(header)
        return rtx().EngineValidity.INVALID, diagnostics

    runtime._runtime = SimpleNamespace(get_engine_validity=judge, engine_header_size=64)
    assert runtime.load(bytes(range(100))) is None
    assert seen == [bytes(range(64))]
    assert_facts(runtime.last_error(), *facts)


class RawContext:
    """A context of TensorRT's that answers what it is told to."""

    def __init__(self, **answers: object) -> None:
        self.answers: dict[str, object] = {"update_device_memory_size_for_shapes": 1000, **answers}
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.calls.append((name, *arguments))
            return self.answers.get(name, True)

        return call


def context_of(raw: RawContext, needs: int = 1, said: str = "") -> TensorRtContext:
    runtime = EngineRuntime(Library(rtx()))
    runtime._logger.log(rtx().ILogger.ERROR, said)
    return TensorRtContext(raw, SimpleNamespace(device_memory_size_v2=needs), runtime, {"x": (1, 2, 3)}, 7)


def test_a_context_has_its_profile_and_shapes_and_knows_its_scratch() -> None:
    raw = RawContext()
    context = context_of(raw)
    assert raw.calls == [
        ("set_optimization_profile_async", 0, 7),
        ("set_input_shape", "x", (1, 2, 3)),
        ("update_device_memory_size_for_shapes",),
    ]
    assert context.scratch_bytes == 1000
    assert context.is_capturable(7)
    assert not context_of(RawContext(is_stream_capturable=False)).is_capturable(7)
    del raw.calls[:]
    for _ in range(2):
        context.enqueue({"x": 256}, 512, 1000, 7)
    names = [name for name, *_ in raw.calls]
    assert names == ["set_device_memory", *(["set_tensor_address", "execute_async_v3"] * 2)]


@pytest.mark.parametrize("call", ["set_optimization_profile_async", "set_input_shape"])
def test_a_call_that_fails_is_an_error_with_the_librarys_reason(call: str) -> None:
    with raises_with(ExecutorError, "because"):
        context_of(RawContext(**{call: False}), said="because")


def test_no_scratch_is_how_the_library_fails_unless_the_engine_needs_none() -> None:
    with raises_with(ExecutorError, "memory", "because"):
        context_of(RawContext(update_device_memory_size_for_shapes=0), said="because")
    assert context_of(RawContext(update_device_memory_size_for_shapes=0), needs=0).scratch_bytes == 0


def test_a_run_that_fails_for_want_of_memory_says_so() -> None:
    context = context_of(RawContext(execute_async_v3=False), said="CUDA error 2: out of memory")
    with raises_with(OutOfDeviceMemoryError, "no memory left", "--vram"):
        context.enqueue({}, 0, 0, 7)
    with raises_with(ExecutorError, "a bad launch"):
        context_of(RawContext(execute_async_v3=False), said="a bad launch").enqueue({}, 0, 0, 7)


# CUDA


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> tuple[CudaDevice, dict[str, Any]]:
    """A CUDA device whose runtime gives these results, by name of the call."""
    pytest.importorskip("cuda.bindings.runtime")
    from cuda.bindings import runtime

    success = runtime.cudaError_t.cudaSuccess
    answers: dict[str, Any] = {
        "cudaGetDeviceCount": (success, 1),
        "cudaGetDeviceProperties": (success, SimpleNamespace(major=8, minor=9, name=b"a card\0")),
        "cudaSetDevice": (success,),
        "cudaGetErrorString": (success, b"what it means"),
    }

    class Runtime:
        def __getattr__(self, name: str) -> Any:
            if name in answers:
                return lambda *arguments: answers[name]
            return getattr(runtime, name)

    monkeypatch.setattr(cuda, "_bindings", Runtime)
    return CudaDevice(), answers


@pytest.mark.parametrize(
    ("call", "status", "error", "facts"),
    [
        ("cudaMalloc", "cudaErrorMemoryAllocation", OutOfDeviceMemoryError, ["the GPU", "2 MiB", "--vram"]),
        ("cudaHostAlloc", "cudaErrorMemoryAllocation", PinnedMemoryError, ["the operating system", "2 MiB"]),
        ("cudaMalloc", "cudaErrorIllegalAddress", DeviceLostError, ["cudaErrorIllegalAddress", "lost"]),
        ("cudaMalloc", "cudaErrorDevicesUnavailable", DeviceLostError, ["cudaErrorDevicesUnavailable", "lost"]),
        (
            "cudaMalloc",
            "cudaErrorInvalidValue",
            ExecutorError,
            ["cudaMalloc", "cudaErrorInvalidValue", "what it means"],
        ),
    ],
)
def test_an_error_of_cuda_is_of_the_class_that_says_what_to_do(
    device: tuple[CudaDevice, dict[str, Any]], call: str, status: str, error: type[ExecutorError], facts: list[str]
) -> None:
    opened, answers = device
    answers[call] = (getattr(opened._cuda.cudaError_t, status), 0)
    with raises_with(error, *facts) as raised:
        (opened.allocate_pinned if call == "cudaHostAlloc" else opened.allocate)(2 << 20)
    assert "--vram" not in str(raised.value) or error is OutOfDeviceMemoryError


def test_every_name_of_a_lost_device_is_an_error_of_cuda(device: tuple[CudaDevice, dict[str, Any]]) -> None:
    known = {error.name for error in device[0]._cuda.cudaError_t}
    assert known >= cuda._LOST
