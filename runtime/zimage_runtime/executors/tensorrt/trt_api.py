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
from ...machine.gpu_targets import GpuTarget
from .block_catalog import ProgramSpec
from .cuda import NO_PACKAGE
from .device import Stream

RTX, FULL = "tensorrt_rtx", "tensorrt"

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
        self.module: Any = module or _installed()
        self.name: str = RTX if "rtx" in self.module.__name__ else FULL
        self.version: str = self.module.__version__

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX, which compiles kernels at run time and has a cache of them."""
        return self.name == RTX

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


def _installed() -> ModuleType:
    for name in (RTX, FULL):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ExecutorError(NO_PACKAGE)


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

    def load(self, data: bytes) -> Any:
        """An engine, or None where it does not fit this library or GPU."""
        return self._runtime.deserialize_cuda_engine(data)

    def last_error(self) -> str:
        """The library's last error message, in one line."""
        return str(self._logger.last_error())

    def use_cache(self, stored: bytes | None) -> None:
        """Sets kernels compiled by earlier runs, for contexts made from now on."""
        self._stored = stored

    def cache(self) -> bytes | None:
        """All kernels compiled so far, to be stored for the next run; None where there are none."""
        return bytes(self._cache.serialize()) if self._cache is not None else None

    def context(self, engine: Any) -> "TensorRtContext":
        """A context whose scratch memory the caller allocates."""
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
            config.set_runtime_cache(self._cache)
        context = engine.create_execution_context(config)
        if context is None:
            raise ExecutorError(f"TensorRT cannot prepare an engine: {self.last_error()}")
        return TensorRtContext(context, self)


class TensorRtContext:
    """Implements `Context`."""

    def __init__(self, context: Any, runtime: EngineRuntime) -> None:
        self._context = context
        self._runtime = runtime
        self._scratch = (0, 0)

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise ExecutorError(
                    f"an engine does not take {name} of shape {list(shape)}: {self._runtime.last_error()}"
                )
        return int(self._context.update_device_memory_size_for_shapes())

    def enqueue(self, addresses: Mapping[str, int], scratch: int, scratch_bytes: int, stream: Stream) -> None:
        if self._scratch != (scratch, scratch_bytes):
            self._context.set_device_memory(scratch, scratch_bytes)
            self._scratch = (scratch, scratch_bytes)
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise ExecutorError(f"an engine has no tensor {name}; run zimage-export engines again")
        if not self._context.execute_async_v3(stream):
            raise ExecutorError(f"an engine failed to run: {self._runtime.last_error()}")
