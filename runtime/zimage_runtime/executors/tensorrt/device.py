"""What the executor asks of a device: a handful of calls, so that its logic can be tested without one.

Addresses are plain integers: device memory, or pinned host memory. Copies and kernels are queued on a stream and run
later, in the stream's order; between streams only events give an order. Whoever frees or overwrites memory must know
that what uses it is done.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Stream = int
DeviceEvent = int
Graph = int


@dataclass(frozen=True)
class Pinned:
    """Page-locked host memory, which copies to and from without a detour."""

    address: int
    data: NDArray[np.uint8]  # a view of it


class Device(Protocol):
    """One GPU. Every method may raise `ExecutorError`."""

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability: (8, 6) for an RTX 30."""

    @property
    def name(self) -> str:
        """What its maker calls it."""

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes in all."""

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes."""

    def free(self, address: int) -> None:
        """Gives device memory back. Nothing that uses it may be under way."""

    def allocate_pinned(self, nbytes: int) -> Pinned:
        """Pinned host memory."""

    def free_pinned(self, pinned: Pinned) -> None:
        """Gives pinned memory back. No copy of it may be under way."""

    def create_stream(self) -> Stream:
        """A new stream."""

    def destroy_stream(self, stream: Stream) -> None:
        """Destroys a stream that is done."""

    def create_event(self) -> DeviceEvent:
        """A new event; until it is recorded, waiting for it is no wait."""

    def destroy_event(self, event: DeviceEvent) -> None:
        """Destroys an event."""

    def record(self, event: DeviceEvent, stream: Stream) -> None:
        """The event happens when all that is now queued on the stream is done."""

    def wait(self, stream: Stream, event: DeviceEvent) -> None:
        """What is queued on the stream from now on runs after the event's last recording."""

    def synchronize_event(self, event: DeviceEvent) -> None:
        """Waits, here on the host, for the event's last recording."""

    def synchronize(self, stream: Stream) -> None:
        """Waits, here on the host, for all that is queued on the stream."""

    def upload(self, device: int, host: int, nbytes: int, stream: Stream) -> None:
        """Queues a copy from pinned memory to the device."""

    def download(self, host: int, device: int, nbytes: int, stream: Stream) -> None:
        """Queues a copy from the device to pinned memory."""

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Queues a copy on the device."""

    def begin_capture(self, stream: Stream) -> None:
        """From now on, what is queued on the stream is recorded instead of run."""

    def end_capture(self, stream: Stream) -> Graph:
        """Ends the recording and returns it, ready to launch."""

    def launch(self, graph: Graph, stream: Stream) -> None:
        """Queues all that was recorded."""

    def destroy_graph(self, graph: Graph) -> None:
        """Destroys a graph that is done."""


class Context(Protocol):
    """An engine, ready to run at shapes that are set once."""

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Sets the shapes of the inputs that have free dimensions; returns the bytes of scratch memory for them."""

    def enqueue(self, addresses: Mapping[str, int], scratch: int, scratch_bytes: int, stream: Stream) -> None:
        """Queues one run. `addresses` names every input and output."""


class Engines(Protocol):
    """Where contexts come from."""

    def context(self, program: str) -> Context:
        """A new context of a block program's engine."""

    def close(self) -> None:
        """Frees all engines, once no context is in use; keeps what makes the next start quick."""
