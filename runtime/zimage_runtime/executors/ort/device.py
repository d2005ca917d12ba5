"""A device as ONNX Runtime sees it: values that stay there, and what its errors mean. For providers of every vendor.

With the CPU in a GPU's place, the same code runs the same programs where there is no GPU.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...arrays import FloatArray
from ...errors import CancelledError, DeviceLostError, ExecutorError
from ..worker import Stop


@dataclass(frozen=True)
class OrtDevice:
    """Where programs run and values stay."""

    kind: str = "cuda"  # as ONNX Runtime names it; "cpu" for tests
    index: int = 0

    def upload(self, values: FloatArray) -> Any:
        """A copy of an array on the device."""
        return self.wrapped(values.copy() if self.kind == "cpu" else np.ascontiguousarray(values))

    def wrapped(self, values: FloatArray) -> Any:
        """An array on the device: on the CPU the array's own memory, elsewhere a copy."""
        import onnxruntime

        try:
            return onnxruntime.OrtValue.ortvalue_from_numpy(values, self.kind, self.index)
        except Exception as error:  # the library's own classes share no base but Exception
            raise explained("copying to the GPU failed", error) from None

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Room for float32 values, which no session owns, so that it outlives them all."""
        import onnxruntime

        try:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self.kind, self.index)
        except Exception as error:
            raise explained("allocating on the GPU failed", error) from None

    def run(self, session: Any, binding: Any, output: str, stop: Stop | None = None) -> FloatArray:
        """Runs what is bound, on values of the device, and copies an output from it."""
        binding.bind_output(output, self.kind, self.index)
        run_bound(session, binding, "a tile failed", stop or Stop())
        return self.download(binding.get_outputs()[0])

    def download(self, value: Any) -> FloatArray:
        """A copy of a value of the device. (A view of a session's memory would keep all of its arena.)"""
        try:
            copy: FloatArray = value.numpy().copy()
        except Exception as error:
            raise explained("copying from the GPU failed", error) from None
        return copy


class Provider(Protocol):
    """One of ONNX Runtime's execution providers."""

    @property
    def device(self) -> OrtDevice:
        """Where its values are."""

    @property
    def shrinks(self) -> str | None:
        """The arena that can give back what a run took, as run options name it; None where none can."""

    def session(self, model: str | bytes, options: Any) -> Any:
        """A session of a model, a file's path or its bytes. Raises what the library raises, or `ExecutorError`."""


def run_bound(session: Any, binding: Any, what: str, stop: Stop, shrink: str | None = None) -> None:
    """Runs what is bound.

    Raises `ExecutorError`, or `CancelledError` within one operator's time of a request to stop.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    if shrink is not None:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", shrink)
    try:
        binding.synchronize_inputs()
        with stop.aborting(lambda: setattr(options, "terminate", True)):
            session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
    except CancelledError:
        raise
    except Exception as error:
        stop.check()
        raise explained(what, error) from None


_NO_MEMORY = (
    *("out of memory", "Failed to allocate memory", "smaller than requested bytes", "bad_alloc"),
    *("ALLOC_FAILED", "ALLOCATION_FAILED"),
)
_LOST = (
    *("illegal memory access", "unspecified launch failure", "illegal instruction", "misaligned address"),
    *("uncorrectable ECC", "hardware stack error", "device is lost", "GPU is lost", "unknown error", "device-side"),
    *("no longer available", "context is destroyed", "launch timed out", "driver shutting down"),
)


def explained(what: str, error: Exception) -> ExecutorError:
    """What ONNX Runtime's error means, in a line that says what to do."""
    text = " ".join(str(error).split())
    if any(sign in text for sign in _NO_MEMORY):
        return ExecutorError(
            f"{what}: the GPU is out of memory; close what else uses it, or try a smaller --size or --vram"
        )
    if any(sign in text for sign in _LOST):
        return DeviceLostError(f"{what}: the GPU was lost ({text[:200]}); run again, or restart the machine")
    return ExecutorError(f"{what}: {text[:300]}")
