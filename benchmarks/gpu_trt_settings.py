"""TensorRT's settings, each in a process of its own: how kernels are compiled, whether a step is captured, and scratch
memory at a size against the largest one that an engine takes."""

from types import SimpleNamespace
from typing import Any

from gpu_images import Child, child_pictures

STRATEGIES = ("EAGER", "LAZY", "NONE")
"""TensorRT for RTX's ways to specialize kernels for a shape."""


def child_tensorrt(options: Child) -> Child:
    """Images with a setting changed, and the scratch memory that engines asked for."""
    import_library(options["strategy"])
    asked = watch_scratch()
    if not options["capture"]:
        without_capture()
    found = child_pictures(options)
    return {**found, "scratch_bytes": max(asked, default=None), "contexts": len(asked)}


def import_library(strategy: str) -> None:
    """Makes the executor's choice of a strategy mean another one. This is one process's own."""
    if strategy == STRATEGIES[0]:
        return
    import tensorrt_rtx

    strategies = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
    tensorrt_rtx.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=getattr(strategies, strategy))


def watch_scratch() -> list[int]:
    """What contexts answer from now on when they are asked how much scratch memory their shapes need."""
    asked: list[int] = []
    try:
        import tensorrt_rtx
    except ImportError:  # the full package, or none
        return asked
    ask = tensorrt_rtx.IExecutionContext.update_device_memory_size_for_shapes

    def noted(context: Any, *arguments: Any) -> int:
        asked.append(int(ask(context, *arguments)))
        return asked[-1]

    tensorrt_rtx.IExecutionContext.update_device_memory_size_for_shapes = noted
    return asked


def without_capture() -> None:
    """Every step is queued kernel by kernel."""
    from zimage_runtime.executors.tensorrt.denoiser import StageDenoiser

    StageDenoiser._replay = lambda self, stage, shapes: self._queue(stage, shapes, 1)  # type: ignore[method-assign]
