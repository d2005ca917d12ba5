"""A device as ONNX Runtime sees it: values that stay there, and what its errors mean. For providers of every vendor.

A device of kind "cpu" keeps values in the host's memory: the library copies them for each run. Some providers want it
so, and with the CPU's own provider the same code runs the same programs where there is no GPU.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...arrays import FloatArray
from ...errors import CancelledError, DeviceLostError, ExecutorError
from ...model.programs import Program
from ..worker import Stop

_BFLOAT16 = 16
"""``TensorProto.BFLOAT16``, by which the library knows the type."""


@dataclass(frozen=True)
class OrtDevice:
    """Where programs run and values stay."""

    kind: str = "cuda"  # as ONNX Runtime names it; "cpu" for the host's memory
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
        """Room for float32 values, which no session owns, so that it outlives them all.

        In the host's memory it is filled with NaN: what a run has not written can be seen.
        """
        import onnxruntime

        if self.kind == "cpu":
            return self.wrapped(np.full(shape, np.nan, np.float32))
        try:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self.kind, self.index)
        except Exception as error:
            raise explained("allocating on the GPU failed", error) from None

    def empty_halves(self, shape: tuple[int, ...]) -> Any:
        """The same for bfloat16 values, which numpy does not have."""
        import onnxruntime

        try:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, _BFLOAT16, self.kind, self.index)
        except Exception as error:
            raise explained("allocating on the GPU failed", error) from None

    def zero_halves(self, shape: tuple[int, ...]) -> Any:
        """A few zeros in bfloat16, in the host's memory: the library copies them for each run."""
        import onnxruntime

        zeros = np.zeros(shape, np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, _BFLOAT16)

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
    def library(self) -> str:
        """Name and version of what computes."""

    @property
    def shrinks(self) -> str | None:
        """The arena that can give back what a run took, as run options name it; None where none can."""

    @property
    def halves_hints(self) -> bool:
        """Whether programs give and take a ControlNet's hints in bfloat16; else in float32."""

    @property
    def checks_outputs(self) -> bool:
        """Whether a run may fail without an error, so that what it gives is to be looked at."""

    def exclusive(self, stop: Stop) -> AbstractContextManager[object]:
        """A turn of this thread, where only one may use the library at a time. May be nested.

        Waiting for it raises `CancelledError` after a request to stop.
        """

    def session(self, model: str | bytes, options: Any, program: Program | None, nbytes: int) -> Any:
        """A session of a program, by its file's path, or of another model, by its bytes. Its weights take `nbytes`.

        Raises what the library raises, or `ExecutorError`.
        """


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
    *("OUT_OF_DEVICE_MEMORY", "OUT_OF_HOST_MEMORY"),
    # WebGPU: a buffer that could not be allocated is an "error object", and this is said where it is used
    "is invalid due to a previous error",
)
_LOST = (
    *("illegal memory access", "unspecified launch failure", "illegal instruction", "misaligned address"),
    *("uncorrectable ECC", "hardware stack error", "device is lost", "GPU is lost", "unknown error", "device-side"),
    *("no longer available", "context is destroyed", "launch timed out", "driver shutting down"),
    *("Device lost", "device was lost", "DEVICE_LOST", "DEVICE_REMOVED", "DEVICE_HUNG"),
)


def checked(what: object, values: FloatArray) -> FloatArray:
    """The values of an output, which are neither all zero nor anywhere not finite: else `ExecutorError`."""
    fault = "nothing but zeros" if not values.any() else "" if np.isfinite(values).all() else "values not finite"
    if fault:
        raise ExecutorError(
            f"{what} gave {fault}: the GPU is out of memory, or its driver computes wrong numbers; "
            "try a smaller --size, another driver or --executor cpu"
        )
    return values


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
