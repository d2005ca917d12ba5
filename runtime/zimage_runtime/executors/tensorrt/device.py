"""What the executor needs of a device, as two dozen calls: a stand-in for them tests its logic without a GPU.

Addresses are plain integers, of device memory or of pinned host memory. Copies and kernels are queued on a stream and
run later, in the stream's order. Only events order two streams. Before memory is freed or overwritten, the caller makes
sure that all work that uses it is done.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import ExecutorError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a program's inputs that have free dimensions."""

Stream = int
DeviceEvent = int
Graph = int


@dataclass(frozen=True)
class Pinned:
    """Page-locked host memory, from and to which a GPU copies directly."""

    address: int
    data: NDArray[np.uint8]  # a view of it


class OutOfDeviceMemoryError(ExecutorError):
    """The GPU has less memory left than was planned with."""


class PinnedMemoryError(ExecutorError):
    """The host's operating system pins no more memory."""


class Device(Protocol):
    """One GPU. Every method may raise `ExecutorError`, or `DeviceLostError` once nothing works any more."""

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability: (8, 6) for an RTX 30."""

    @property
    def name(self) -> str:
        """What its maker calls it."""

    def memory(self) -> tuple[int, int]:
        """Free bytes and total bytes."""

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes. Raises `OutOfDeviceMemoryError`."""

    def free(self, address: int) -> None:
        """Frees device memory. No work that uses it may be pending."""

    def allocate_pinned(self, nbytes: int) -> Pinned:
        """Pinned host memory. Raises `PinnedMemoryError`."""

    def free_pinned(self, pinned: Pinned) -> None:
        """Frees pinned memory. No copy from or to it may be pending."""

    def create_stream(self) -> Stream:
        """A new stream."""

    def destroy_stream(self, stream: Stream) -> None:
        """Destroys a stream with no pending work."""

    def create_event(self) -> DeviceEvent:
        """A new event. Until it is recorded, waiting for it returns at once."""

    def destroy_event(self, event: DeviceEvent) -> None:
        """Destroys an event."""

    def record(self, event: DeviceEvent, stream: Stream) -> None:
        """Makes the event happen when all work now queued on the stream is done."""

    def wait(self, stream: Stream, event: DeviceEvent) -> None:
        """Makes what is queued on the stream from now on run after the event's last recording."""

    def synchronize_event(self, event: DeviceEvent) -> None:
        """Blocks the calling thread until the event's last recording has happened."""

    def synchronize(self, stream: Stream) -> None:
        """Blocks the calling thread until all work queued on the stream is done."""

    def upload(self, device: int, host: int, nbytes: int, stream: Stream) -> None:
        """Queues a copy from pinned memory to the device."""

    def download(self, host: int, device: int, nbytes: int, stream: Stream) -> None:
        """Queues a copy from the device to pinned memory."""

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Queues a copy on the device."""

    def begin_capture(self, stream: Stream) -> None:
        """Records what is queued on the stream from now on, instead of running it."""

    def end_capture(self, stream: Stream) -> Graph:
        """Ends the recording and returns it as a graph that can be launched."""

    def launch(self, graph: Graph, stream: Stream) -> None:
        """Queues a graph."""

    def destroy_graph(self, graph: Graph) -> None:
        """Destroys a graph with no pending launch."""


class Context(Protocol):
    """An engine that is ready to run at fixed shapes."""

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory that a run needs."""

    def is_capturable(self, stream: Stream) -> bool:
        """Whether a run may be recorded into a graph."""

    def enqueue(self, addresses: Mapping[str, int], scratch: int, scratch_bytes: int, stream: Stream) -> None:
        """Queues one run. `addresses` names every input and output."""


ContextKey = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


def context_key(program: str, shapes: Shapes) -> ContextKey:
    """What one context differs from another in."""
    return program, tuple(sorted(shapes.items()))


class Engines(Protocol):
    """Makes contexts for a bundle's block programs."""

    def context(self, program: str, shapes: Shapes, stream: Stream) -> Context:
        """A context of a block program's engine at these shapes. The last ones are kept, for stages that return."""

    def save(self) -> None:
        """Stores kernels compiled since the last time, for the next start."""

    def close(self) -> None:
        """Saves, and frees all engines. No context may be in use."""
