"""TensorRT itself: `tensorrt_rtx`, or the full `tensorrt` for GPUs that only it supports. One module for both.

Building with `tensorrt_rtx` needs no GPU and no driver. Loading and running engines needs both.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from ...errors import ExecutorError
from ...machine.gpu_targets import OLDEST, GpuTarget
from .block_catalog import ProgramSpec
from .cuda import NO_PACKAGE
from .device import OutOfDeviceMemoryError, Shapes, Stream
from .engine_cache import Builder

RTX, FULL = "tensorrt_rtx", "tensorrt"

_RTX_SERVES = ((7, 5), (8, 6), (8, 9), (12, 0))
"""Compute capabilities that every version of TensorRT for RTX serves. Source: NVIDIA's support matrix. It never lists
8.0, 9.0 or 10.x, GPUs of data centres."""

_RTX_MAY_SERVE = {"SM121": (12, 1)}
"""Those that later versions serve, by the name that the builder has for them then."""

_NO_MEMORY = re.compile(r"out ?of ?memory|memory ?allocation", re.IGNORECASE)

_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")


@dataclass(frozen=True)
class Built:
    """A built engine, and the builder's log."""

    data: bytes
    log: str  # with `detailed`, every fused layer with its types and shapes

    @property
    def activation_bytes(self) -> int | None:
        """Scratch memory at the profile's largest shapes, if it is in the log."""
        found = _ACTIVATIONS.findall(self.log)
        return int(found[-1]) if found else None


class Library:
    """One of the two packages."""

    def __init__(self, module: ModuleType | None = None) -> None:
        """Uses `module`, or the package that is installed, RTX first. Raises `ExecutorError` where there is none."""
        self.module: Any = module or _installed()[0]
        self.name: str = RTX if "rtx" in self.module.__name__ else FULL
        self.version: str = self.module.__version__

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX, which compiles kernels at run time and has a cache of them."""
        return self.name == RTX

    @property
    def flags(self) -> tuple[str, ...]:
        """The builder flags that are set, by name.

        Without `REQUIRE_USER_ALLOCATION`, TensorRT for RTX leaves large tensors to an allocation of its own at run
        time, which no plan knows of; with it, it refuses to build what cannot be captured into a CUDA graph.
        """
        return tuple(name for name in ("REQUIRE_USER_ALLOCATION",) if hasattr(self.module.BuilderFlag, name))

    @property
    def builder(self) -> Builder:
        """What an engine's name says of how it was built."""
        return Builder(self.name, self.version, (*self.flags, "-TF32"))

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether it runs engines on GPUs of a compute capability."""
        if not self.is_rtx:
            return capability >= OLDEST
        names = getattr(self.module, "ComputeCapability", None)
        later = (served for name, served in _RTX_MAY_SERVE.items() if hasattr(names, name))
        return capability in (*_RTX_SERVES, *later)

    def build(self, onnx: bytes, spec: ProgramSpec, gpus: Sequence[GpuTarget] = (), *, detailed: bool = False) -> Built:
        """Builds one engine. Without `gpus`, it is portable with TensorRT for RTX, otherwise for this machine's GPU.

        Raises `ExecutorError` with the library's last error message.
        """
        trt = self.module
        logger = _logger(trt, trt.ILogger.VERBOSE if detailed else trt.ILogger.WARNING)
        builder = trt.Builder(logger)
        flags = 0
        if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # the full package has no other kind
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(onnx):
            raise ExecutorError(f"{self.name} cannot read block program {spec.name}: {logger.last_error()}")
        config = builder.create_builder_config()
        config.max_aux_streams = 0  # one stream, so that a step can be captured; one kernel fills a GPU
        for flag in self.flags:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        config.clear_flag(trt.BuilderFlag.TF32)  # what is float32 in a program is meant to be
        if resizes := getattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None):
            config.set_preview_feature(resizes, True)  # scratch memory is then for the shapes, not for the largest
        if detailed:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        targets = [gpu for gpu in gpus if gpu is not GpuTarget.PORTABLE]
        if targets and hasattr(trt, "ComputeCapability"):
            config.num_compute_capabilities = len(targets)
            for index, gpu in enumerate(targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, gpu.name), index)
        profile = builder.create_optimization_profile()
        for name, shapes in spec.profile.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise ExecutorError(f"{self.name} cannot build block program {spec.name}: {logger.last_error()}")
        return Built(bytes(data), logger.text())

    def runtime(self) -> "EngineRuntime":
        """A loader of engines. Needs a GPU."""
        return EngineRuntime(self)


def library_for(capability: tuple[int, int]) -> Library:
    """The installed package that runs engines on a GPU, RTX first.

    Raises `ExecutorError` where there is none, which says what serves the GPU.
    """
    found = [Library(module) for module in _installed()]
    if capability < OLDEST:
        return found[0]  # programs refuse these, with a better text
    library = next((library for library in found if library.serves(capability)), None)
    if library is None:
        major, minor = capability
        raise ExecutorError(
            f"{found[0].name} {found[0].version} does not serve GPUs of compute capability {major}.{minor}; use "
            f"--executor cuda, or install the full TensorRT: `pip install {FULL}`"
        )
    return library


def _installed() -> list[ModuleType]:
    found = []
    for name in (RTX, FULL):
        try:
            found.append(import_module(name))
        except ImportError:
            continue
    if not found:
        raise ExecutorError(NO_PACKAGE)
    return found


def _logger(trt: Any, least: Any) -> Any:
    """A logger that keeps messages of `least` and graver. Its class needs the imported module as its base."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(least):
                self.lines.append((int(severity), message))

        def text(self) -> str:
            return "\n".join(message for _, message in self.lines)

        def last_error(self) -> str:
            errors = [message for severity, message in self.lines if severity <= int(trt.ILogger.ERROR)]
            return " ".join((errors or ["no reason given"])[-1].split())[:300]

    return Logger()


class EngineRuntime:
    """Loads engines and makes contexts, which share one cache of compiled kernels."""

    def __init__(self, library: Library) -> None:
        self._trt = library.module
        self._rtx = library.is_rtx
        self._logger = _logger(self._trt, self._trt.ILogger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        self._cache: Any = None
        self._stored: bytes | None = None
        self._refusal = ""

    def load(self, data: bytes) -> Any:
        """An engine, or None where it does not fit this library or GPU; `last_error` then says why."""
        self._refusal = self._why_invalid(data)
        return None if self._refusal else self._runtime.deserialize_cuda_engine(data)

    def _why_invalid(self, data: bytes) -> str:
        """What the library says of an engine's header; empty where it fits, and where the bindings cannot tell."""
        trt, runtime = self._trt, self._runtime
        if not hasattr(runtime, "get_engine_validity"):
            return ""
        validity, diagnostics = runtime.get_engine_validity(data[: getattr(runtime, "engine_header_size", 64)])
        if validity != trt.EngineValidity.INVALID:
            return ""
        known = trt.EngineInvalidityDiagnostics.__members__
        reasons = [name for name, bit in known.items() if int(diagnostics) & int(bit)]
        return ", ".join(reason.lower().replace("_", " ") for reason in reasons) or "invalid engine"

    def last_error(self) -> str:
        """Why the library last refused something, in one line."""
        return self._refusal or str(self._logger.last_error())

    def use_cache(self, stored: bytes | None) -> None:
        """Sets kernels compiled by earlier runs, for contexts made from now on."""
        self._stored = stored

    def cache(self) -> bytes | None:
        """All kernels compiled so far, to be stored for the next run; None where there are none."""
        return bytes(self._cache.serialize()) if self._cache is not None else None

    def context(self, engine: Any, shapes: Shapes, stream: Stream) -> "TensorRtContext":
        """A context at fixed shapes, whose scratch memory the caller allocates."""
        trt = self._trt
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._rtx:
            # kernels for exactly these shapes, compiled before the first run: an image has few shapes and many steps
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the denoiser captures a whole step
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                if self._stored:
                    self._cache.deserialize(self._stored)
                self._stored = None
            config.set_runtime_cache(self._cache)
        context = engine.create_execution_context(config)
        if context is None:
            raise self.failure("TensorRT cannot prepare an engine")
        return TensorRtContext(context, engine, self, shapes, stream)

    def failure(self, what: str) -> ExecutorError:
        """The error for a call that failed, with the library's reason."""
        reason = str(self._logger.last_error())
        if _NO_MEMORY.search(reason):
            return OutOfDeviceMemoryError(f"{what}: the GPU has no memory left; lower --vram ({reason})")
        return ExecutorError(f"{what}: {reason}")


class TensorRtContext:
    """Implements `Context`."""

    def __init__(self, context: Any, engine: Any, runtime: EngineRuntime, shapes: Shapes, stream: Stream) -> None:
        """Raises `ExecutorError` for shapes that the engine does not take."""
        self._context = context
        self._runtime = runtime
        self._memory = (0, 0)
        # implicit for the first context of an engine alone
        if not context.set_optimization_profile_async(0, stream):
            raise runtime.failure("an engine's profile cannot be set")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise runtime.failure(f"an engine does not take {name} of shape {list(shape)}")
        self._scratch = int(context.update_device_memory_size_for_shapes())
        if self._scratch <= 0 and int(engine.device_memory_size_v2) > 0:  # 0 is how the function fails
            raise runtime.failure("TensorRT does not report the memory that an engine needs")

    @property
    def scratch_bytes(self) -> int:
        return self._scratch

    def is_capturable(self, stream: Stream) -> bool:
        asked = getattr(self._context, "is_stream_capturable", None)  # of TensorRT for RTX alone
        return asked is None or bool(asked(stream))

    def enqueue(self, addresses: Mapping[str, int], scratch: int, scratch_bytes: int, stream: Stream) -> None:
        if self._memory != (scratch, scratch_bytes):
            self._context.set_device_memory(scratch, scratch_bytes)
            self._memory = (scratch, scratch_bytes)
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise ExecutorError(f"an engine has no tensor {name}; run zimage-export engines again")
        if not self._context.execute_async_v3(stream):
            raise self._runtime.failure("an engine failed to run")
