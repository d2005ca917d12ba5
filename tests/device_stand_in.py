"""A stand-in for a GPU that records, checks and runs what it is asked to. No GPU, no CUDA: it proves the executor's
logic, not its speed nor a real device's arithmetic.

Device memory is host memory behind made-up addresses. What is queued runs late, in an order that only streams and
events constrain, chosen at random: code that forgets to wait gets wrong values. In any order, each access is compared
with the earlier ones to the same bytes: two that conflict and that no stream, event or synchronization orders are an
error (the happened-before relation, by vector clocks). So are reading what was never written, freeing what is in use,
overwriting pinned memory that a copy still needs, copying beyond an allocation, and exceeding the budget.
"""

import bisect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.errors import ExecutorError
from zimage_runtime.executors.tensorrt.device import OutOfDeviceMemoryError, Pinned, PinnedMemoryError

Bytes = NDArray[np.uint8]
Clock = dict[int, int]  # stream → number of its operations that are known to be done; the host's own is key 0

ALIGNMENT = 256
_DEVICE, _HOST = 1 << 40, 1 << 50
_POISON = 0xC7  # of memory that nobody wrote; as float32, about -1e5


class MisuseError(AssertionError):
    """The executor did what a real device would answer with wrong images or a crash."""


@dataclass
class Region:
    """An allocation."""

    base: int
    data: Bytes
    written: NDArray[np.bool_]
    accesses: list["Access"] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.base + len(self.data)


@dataclass(frozen=True)
class Access:
    """Bytes that an operation reads or writes."""

    start: int
    stop: int
    writes: bool
    stream: int
    number: int  # of the operation in its stream
    what: str


@dataclass
class Operation:
    """Something queued on a stream."""

    what: str
    reads: Sequence[tuple[int, int]]  # address and bytes
    writes: Sequence[tuple[int, int]]
    run: Callable[[], None]
    waits: tuple[int, int] | None = None  # a stream, and how many of its operations must be done first
    source: tuple[int, int] | None = None  # pinned bytes that must not change before it runs
    snapshot: bytes = b""


@dataclass
class StandInDevice:
    """Implements `Device`."""

    limit: int = 1 << 40  # bytes; the budget that must not be exceeded
    seed: int = 0
    capability: tuple[int, int] = (8, 6)
    name: str = "stand-in"
    fail: Callable[[str], bool] = lambda call: False  # whether a call fails, as a broken device would
    error: type[ExecutorError] = ExecutorError  # that it fails with
    room: int = 1 << 40  # bytes that others have left of its memory
    most_pinned: int = 1 << 40  # bytes that are pinned in one piece
    track: bool = True  # compare accesses; costs time where there are many
    calls: list[str] = field(default_factory=list)
    used: int = 0
    peak: int = 0
    uploaded: int = 0  # bytes
    _regions: list[Region] = field(default_factory=list)
    _bases: list[int] = field(default_factory=list)
    _next: dict[int, int] = field(default_factory=lambda: {_DEVICE: _DEVICE, _HOST: _HOST})
    _handles: int = 0
    _queues: dict[int, list[Operation]] = field(default_factory=dict)
    _done: dict[int, int] = field(default_factory=dict)  # operations run, by stream
    _queued: dict[int, int] = field(default_factory=dict)
    _clocks: dict[int, Clock] = field(default_factory=dict)  # what each stream's next operation comes after
    _host: Clock = field(default_factory=dict)
    _events: dict[int, tuple[int, int, Clock] | None] = field(default_factory=dict)
    _graphs: dict[int, list[Operation]] = field(default_factory=dict)
    _capturing: dict[int, list[Operation]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    # Memory

    def memory(self) -> tuple[int, int]:
        return self.limit - self.used, self.limit

    def allocate(self, nbytes: int) -> int:
        self._call("allocate")
        self._not_capturing("allocate")
        if self.used + nbytes > self.room:
            raise OutOfDeviceMemoryError(f"{nbytes} bytes are more than others have left")
        if self.used + nbytes > self.limit:
            raise MisuseError(f"{nbytes} bytes more than {self.used} exceed the budget of {self.limit}")
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return self._region(_DEVICE, nbytes).base

    def free(self, address: int) -> None:
        self._call("free")
        self._not_capturing("free")
        self.used -= len(self._drop(address).data)

    def allocate_pinned(self, nbytes: int) -> Pinned:
        self._call("allocate_pinned")
        if nbytes > self.most_pinned:
            raise PinnedMemoryError(f"{nbytes} bytes are more than is pinned")
        region = self._region(_HOST, nbytes)
        region.written[:] = True  # the host writes to it unseen
        return Pinned(region.base, region.data)

    def free_pinned(self, pinned: Pinned) -> None:
        self._call("free_pinned")
        self._drop(pinned.address)

    def _region(self, space: int, nbytes: int) -> Region:
        if nbytes <= 0:
            raise MisuseError(f"an allocation of {nbytes} bytes")
        base = self._next[space]
        self._next[space] = (base + nbytes + 2 * ALIGNMENT) // ALIGNMENT * ALIGNMENT
        region = Region(base, np.full(nbytes, _POISON, np.uint8), np.zeros(nbytes, np.bool_))
        place = bisect.bisect(self._bases, base)
        self._bases.insert(place, base)
        self._regions.insert(place, region)
        return region

    def _drop(self, address: int) -> Region:
        place = bisect.bisect(self._bases, address) - 1
        if place < 0 or self._bases[place] != address:
            raise MisuseError(f"freed address {address:#x}, which is no allocation")
        region = self._regions[place]
        for access in region.accesses:
            if not self._before(access, self._host):
                raise MisuseError(f"freed while {access.what} may still be under way")
        for queue in [*self._queues.values(), *self._graphs.values()]:
            for operation in queue:
                for start, _ in [*operation.reads, *operation.writes]:
                    if region.base <= start < region.end:
                        raise MisuseError(f"freed while {operation.what} is queued or captured")
        del self._bases[place], self._regions[place]
        return region

    def find(self, address: int, nbytes: int, what: str) -> tuple[Region, int]:
        """The allocation that bytes lie in, and where."""
        place = bisect.bisect(self._bases, address) - 1
        region = self._regions[place] if place >= 0 else None
        if region is None or address >= region.end:
            raise MisuseError(f"{what} uses address {address:#x}, which is not allocated")
        if address + nbytes > region.end:
            raise MisuseError(f"{what} uses {nbytes} bytes where {region.end - address} are allocated")
        return region, address - region.base

    def view(self, address: int, nbytes: int, what: str = "a look") -> Bytes:
        """Bytes as they are now."""
        region, offset = self.find(address, nbytes, what)
        return region.data[offset : offset + nbytes]

    # Streams and events

    def create_stream(self) -> int:
        self._call("create_stream")
        stream = self._handle()
        self._queues[stream], self._done[stream], self._queued[stream], self._clocks[stream] = [], 0, 0, {}
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._call("destroy_stream")
        if self._queues.pop(stream):
            raise MisuseError("a stream was destroyed with work queued")

    def create_event(self) -> int:
        self._call("create_event")
        event = self._handle()
        self._events[event] = None
        return event

    def destroy_event(self, event: int) -> None:
        self._call("destroy_event")
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        self._call("record")
        self._known(event)
        if stream in self._capturing:
            raise MisuseError("an event was recorded on a stream that is captured")
        number = self._queued[stream]
        self._events[event] = (stream, number, {**self._clocks[stream], stream: number})

    def wait(self, stream: int, event: int) -> None:
        self._call("wait")
        recorded = self._known(event)
        if stream in self._capturing:
            raise MisuseError("a captured stream waits for an event from outside the capture")
        if recorded is None:
            return
        source, number, clock = recorded
        self._queues[stream].append(Operation("wait", (), (), lambda: None, (source, number)))
        self._queued[stream] += 1
        _join(self._clocks[stream], clock)

    def synchronize_event(self, event: int) -> None:
        self._call("synchronize_event")
        recorded = self._known(event)
        if recorded is not None:
            source, number, clock = recorded
            self._run_until(source, number)
            _join(self._host, clock)

    def synchronize(self, stream: int) -> None:
        self._call("synchronize")
        self._not_capturing("synchronize")
        self._run_until(stream, self._queued[stream])
        _join(self._host, {**self._clocks[stream], stream: self._queued[stream]})

    def _known(self, event: int) -> tuple[int, int, Clock] | None:
        if event not in self._events:
            raise MisuseError("an event is used that does not exist any more")
        return self._events[event]

    # Work

    def upload(self, device: int, host: int, nbytes: int, stream: int) -> None:
        self._call("upload")
        self.uploaded += nbytes
        self._copy("upload", device, host, nbytes, stream, pinned_source=True)

    def download(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self._call("download")
        self._copy("download", host, device, nbytes, stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("copy")
        self._copy("copy", target, source, nbytes, stream)

    def _copy(
        self, what: str, target: int, source: int, nbytes: int, stream: int, *, pinned_source: bool = False
    ) -> None:
        def run() -> None:
            self.view(target, nbytes)[:] = self.view(source, nbytes)

        operation = Operation(what, [(source, nbytes)], [(target, nbytes)], run)
        if pinned_source:
            operation.source = (source, nbytes)
        self.enqueue(operation, stream)

    def enqueue(self, operation: Operation, stream: int) -> None:
        """Queues work, or records it. Engines call this, too."""
        if stream in self._capturing:
            for address, nbytes in [*operation.reads, *operation.writes]:
                self.find(address, nbytes, operation.what)
            self._capturing[stream].append(operation)
            return
        self._submit(operation, stream)

    def _submit(self, operation: Operation, stream: int) -> None:
        number = self._queued[stream] + 1
        clock = self._clocks[stream]
        _join(clock, self._host)  # the host queues it now, after all that it has waited for
        clock[stream] = number - 1
        for ranges, writes in ((operation.reads, False), (operation.writes, True)):
            for address, nbytes in ranges:
                self._check(operation.what, address, nbytes, writes, stream, number, clock)
        for address, nbytes in operation.writes:
            region, offset = self.find(address, nbytes, operation.what)
            region.written[offset : offset + nbytes] = True
            if address >= _HOST:
                region.data[offset : offset + nbytes] = _POISON  # until it is really there
        if operation.source is not None:
            operation = Operation(**{**vars(operation), "snapshot": self.view(*operation.source).tobytes()})
        self._queues[stream].append(operation)
        self._queued[stream] = number
        if self._random.random() < 0.3:  # sometimes the device is quick
            self._advance()

    def _check(
        self, what: str, address: int, nbytes: int, writes: bool, stream: int, number: int, clock: Clock
    ) -> None:
        region, offset = self.find(address, nbytes, what)
        if not writes and not region.written[offset : offset + nbytes].all():
            raise MisuseError(f"{what} reads what nobody wrote")
        if not self.track:
            return
        start, stop = offset, offset + nbytes
        kept = []
        for access in region.accesses:
            overlaps = access.start < stop and start < access.stop
            ordered = self._before(access, clock)
            if overlaps and (writes or access.writes) and not ordered:
                kind = f"{'write' if writes else 'read'} of {what} and {'write' if access.writes else 'read'} of"
                raise MisuseError(f"nothing orders the {kind} {access.what}")
            # what a later access of the same stream covers needs no further look
            covered = access.stream == stream and start <= access.start and access.stop <= stop
            if not (covered and (writes or not access.writes)):
                kept.append(access)
        region.accesses = [*kept, Access(start, stop, writes, stream, number, what)]

    @staticmethod
    def _before(access: Access, clock: Clock) -> bool:
        return clock.get(access.stream, 0) >= access.number

    def _run_until(self, stream: int, number: int) -> None:
        while self._done[stream] < number:
            if not self._advance(stream):
                raise MisuseError("a stream waits for what never comes")

    def _advance(self, wanted: int | None = None) -> bool:
        """Runs one operation that may run now, of any stream."""
        ready = [s for s, queue in self._queues.items() if queue and self._may_run(queue[0])]
        if not ready:
            return False
        stream = self._random.choice(ready)
        operation = self._queues[stream].pop(0)
        if operation.source is not None and self.view(*operation.source).tobytes() != operation.snapshot:
            raise MisuseError(f"pinned memory of {operation.what} was overwritten before it ran")
        operation.run()
        self._done[stream] += 1
        return True

    def _may_run(self, operation: Operation) -> bool:
        return operation.waits is None or self._done[operation.waits[0]] >= operation.waits[1]

    # Graphs

    def begin_capture(self, stream: int) -> None:
        self._call("begin_capture")
        if self._capturing:
            raise MisuseError("a capture began within another")
        self._capturing[stream] = []

    def end_capture(self, stream: int) -> int:
        recorded = self._capturing.pop(stream)  # a capture ends, well or not
        self._call("end_capture")
        graph = self._handle()
        self._graphs[graph] = recorded
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._call("launch")
        if graph not in self._graphs:
            raise MisuseError("a graph is launched that does not exist any more")
        for operation in self._graphs[graph]:
            self._submit(operation, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("destroy_graph")
        del self._graphs[graph]

    # What tests ask

    def assert_clean(self) -> None:
        """Nothing is left: no memory, events, graphs or work."""
        assert not self._regions, f"{len(self._regions)} allocations were never freed"
        assert self.used == 0
        assert not self._events, "events were never destroyed"
        assert not self._graphs, "graphs were never destroyed"
        assert not any(self._queues.values()), "work was left queued"
        assert not self._queues, "streams were never destroyed"

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fail(name):
            raise self.error(f"{name} failed, as the test wants it to")

    def _not_capturing(self, name: str) -> None:
        if self._capturing:
            raise MisuseError(f"{name} is not allowed during a capture")

    def _handle(self) -> int:
        self._handles += 1
        return self._handles


def _join(clock: Clock, other: Mapping[int, int]) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)
