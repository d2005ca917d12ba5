"""Everything that a stage allocates on the device, counted against the budget and freed together."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import ExecutorError
from ...units import gib_free, gib_needed
from .block_catalog import aligned
from .device import Device, DeviceEvent, Graph, Pinned


@dataclass
class Budget:
    """Bytes that may be allocated, all stages together."""

    limit: int
    used: int = 0
    peak: int = 0

    def take(self, nbytes: int) -> None:
        """Raises `ExecutorError` where the plan was wrong: a budget is never exceeded silently."""
        if self.used + nbytes > self.limit:
            raise ExecutorError(
                f"{gib_needed(self.used + nbytes, 2)} of device memory is needed where {gib_free(self.limit, 2)} was "
                "planned, which is a fault of the plan; set --vram lower, and report it"
            )
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def give_back(self, nbytes: int) -> None:
        """Makes bytes that were taken available again."""
        self.used -= nbytes


@dataclass
class Arena:
    """The owner of allocations, pinned memory, events and graphs.

    The caller frees them only when no copy or kernel that uses them is pending.
    """

    device: Device
    budget: Budget
    _sizes: dict[int, int] = field(default_factory=dict)
    _pinned: list[Pinned] = field(default_factory=list)
    _events: list[DeviceEvent] = field(default_factory=list)
    _graphs: list[Graph] = field(default_factory=list)

    def allocate(self, nbytes: int) -> int:
        """Device memory of the stage: its address, or 0 for 0 bytes."""
        size = aligned(nbytes)
        if size == 0:
            return 0
        self.budget.take(size)
        try:
            address = self.device.allocate(size)
        except BaseException:
            self.budget.give_back(size)
            raise
        self._sizes[address] = size
        return address

    def pinned(self, nbytes: int) -> Pinned:
        """Pinned memory of the stage."""
        pinned = self.device.allocate_pinned(max(nbytes, 1))
        self._pinned.append(pinned)
        return pinned

    def release_pinned(self, pinned: Pinned) -> None:
        """Frees pinned memory before the rest."""
        self._pinned.remove(pinned)
        self.device.free_pinned(pinned)

    def event(self) -> DeviceEvent:
        """An event of the stage."""
        event = self.device.create_event()
        self._events.append(event)
        return event

    def keep_graph(self, graph: Graph) -> None:
        """Takes over a graph, which `release` destroys."""
        self._graphs.append(graph)

    def release(self) -> None:
        """Frees everything. Where that fails, the rest is freed all the same, and the first error is raised."""
        device, failures = self.device, []
        frees: list[Callable[[], None]] = [
            *(functools.partial(device.destroy_graph, graph) for graph in self._graphs),
            *(functools.partial(device.destroy_event, event) for event in self._events),
            *(functools.partial(device.free_pinned, pinned) for pinned in self._pinned),
            *(functools.partial(device.free, address) for address in self._sizes),
        ]
        self.budget.give_back(sum(self._sizes.values()))
        for owned in (self._graphs, self._events, self._pinned, self._sizes):
            owned.clear()
        for free in frees:
            try:
                free()
            except ExecutorError as error:
                failures.append(error)
        if failures:
            raise failures[0]
