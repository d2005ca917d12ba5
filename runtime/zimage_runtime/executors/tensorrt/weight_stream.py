"""The weights of a stage's blocks on the device: resident ones, and streamed ones that take turns in two slots.

The weights of a streamed block are copied from host memory to a pinned staging buffer, and from there to a slot. When
the block has run, its slot is free for another. Copies and kernels run on two streams, which these events order:

- `ready[slot]`, on the copy stream after a slot is written. The slot's block waits for it, and so does the host before
  it writes to the slot's staging buffer again.
- `done[slot]`, on the compute stream after the slot's block has run. The next copy into the slot waits for it.

Staging buffers are as large as a block. If the operating system does not pin that much, blocks are put together in
pageable memory and copied in pieces, through two small pinned buffers.

While a block runs, the next one's weights are in the other slot or on their way there. A stage that passes through its
blocks many times also copies across the end of a pass, so that the first blocks are ready when the next pass begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .arena import Arena
from .device import Device, DeviceEvent, Pinned, PinnedMemoryError, Stream
from .plan import SLOTS, StagePlan

Fill = Callable[[int, NDArray[np.uint8]], None]
"""Writes the weights of a block, by its index, into a buffer of its size."""


PIECE = 16 << 20
"""Bytes of each of the two small pinned buffers."""


@dataclass
class WeightStream:
    """The weights of one stage. `load` it once. Each pass then acquires and releases every block in order."""

    device: Device
    arena: Arena
    plan: StagePlan
    fill: Fill
    compute: Stream
    copies: Stream
    wraps: bool = False  # whether there are many passes
    pinnable: int = 0  # bytes of streamed blocks that stay in pinned memory after the first pass
    _addresses: dict[int, int] = field(default_factory=dict)
    _slots: list[int] = field(default_factory=list)
    _staging: list[Pinned] = field(default_factory=list)
    _pageable: NDArray[np.uint8] | None = None  # a block that is copied in pieces
    _copied: list[DeviceEvent] = field(default_factory=list)  # recorded after a piece's copy
    _pieces: int = 0  # so far; piece n is in staging buffer n % 2
    _ready: list[DeviceEvent] = field(default_factory=list)
    _done: list[DeviceEvent] = field(default_factory=list)
    _pinned: dict[int, Pinned] = field(default_factory=dict)
    _queued: int = 0  # copies of streamed blocks so far; copy n goes to slot n % 2
    _used: int = 0  # streamed blocks that were released so far

    def load(self) -> None:
        """Allocates everything and uploads the resident blocks."""
        sizes, streamed = self.plan.needs.block_bytes, self.plan.streamed
        for index in sorted(self.plan.resident):
            self._addresses[index] = self.arena.allocate(sizes[index])
        self._slots = [self.arena.allocate(self.plan.slot_bytes) for _ in range(SLOTS if streamed else 0)]
        self._stage(max(sizes, default=0))
        self._ready = [self.arena.event() for _ in range(SLOTS)]
        self._done = [self.arena.event() for _ in range(SLOTS)]
        for turn, index in enumerate(sorted(self.plan.resident)):
            self._upload(turn % SLOTS, index, self._addresses[index])
        if not streamed:  # nothing more is copied
            self.device.synchronize(self.copies)
            self._unstage()
            self._pageable = None
        self._order_after_residents()

    def _order_after_residents(self) -> None:
        """Makes all computing wait for the copies of the resident blocks."""
        event = self.arena.event()
        self.device.record(event, self.copies)
        self.device.wait(self.compute, event)

    def begin(self) -> None:
        """Begins a pass: queues the copies of the first streamed blocks, unless that is done."""
        while self.plan.streamed and self._queued - self._used < SLOTS:
            self._queue_next()

    def acquire(self, index: int) -> int:
        """The address of a block's weights. Kernels queued on the compute stream from now on may read them."""
        if index in self._addresses:
            return self._addresses[index]
        slot = self._used % SLOTS
        self.device.wait(self.compute, self._ready[slot])
        return self._slots[slot]

    def release(self, index: int) -> None:
        """Ends the use of a block: all kernels that read it are queued. After them, its slot may be written."""
        if index in self._addresses:
            return
        slot = self._used % SLOTS
        self.device.record(self._done[slot], self.compute)
        self._used += 1
        if self.wraps or self._queued % len(self.plan.streamed):
            self._queue_next()

    def _queue_next(self) -> None:
        """Queues the copy of the next streamed block into the slot that was used least recently."""
        streamed: Sequence[int] = self.plan.streamed
        slot = self._queued % SLOTS
        index = streamed[self._queued % len(streamed)]
        self.device.wait(self.copies, self._done[slot])
        self._upload(slot, index, self._slots[slot])
        self._queued += 1

    def _upload(self, turn: int, index: int, address: int) -> None:
        nbytes = self.plan.needs.block_bytes[index]
        staging = self._pinned.get(index) or self._pin(index, nbytes)
        if staging is None and self._pageable is not None:
            self.fill(index, self._pageable[:nbytes])
            self._upload_pieces(self._pageable[:nbytes], address)
        else:
            if staging is None:
                staging = self._staging[turn]
                self.device.synchronize_event(self._ready[turn])
                self.fill(index, staging.data[:nbytes])
            self.device.upload(address, staging.address, nbytes, self.copies)
        self.device.record(self._ready[turn], self.copies)

    def _pin(self, index: int, nbytes: int) -> Pinned | None:
        """Pinned memory that keeps a streamed block, filled; None where blocks are not kept or no more is pinned."""
        if nbytes > self.pinnable or index in self._addresses:
            return None
        try:
            staging = self._pinned[index] = self.arena.pinned(nbytes)
        except PinnedMemoryError:
            self.pinnable = 0  # the others are read again in each pass
            return None
        self.pinnable -= nbytes
        self.fill(index, staging.data[:nbytes])
        return staging

    def _stage(self, nbytes: int) -> None:
        """Allocates the two staging buffers."""
        try:
            for _ in range(SLOTS):
                self._staging.append(self.arena.pinned(nbytes))
        except PinnedMemoryError:
            self._unstage()
            self._staging = [self.arena.pinned(min(PIECE, nbytes)) for _ in range(SLOTS)]
            self._copied = [self.arena.event() for _ in range(SLOTS)]
            self._pageable = np.empty(nbytes, np.uint8)

    def _unstage(self) -> None:
        for staging in self._staging:
            self.arena.release_pinned(staging)
        self._staging = []

    def _upload_pieces(self, values: NDArray[np.uint8], address: int) -> None:
        """Queues copies of pageable memory, which may change once this returns."""
        for start in range(0, len(values), PIECE):
            turn = self._pieces % SLOTS
            self.device.synchronize_event(self._copied[turn])
            piece = values[start : start + PIECE]
            self._staging[turn].data[: len(piece)] = piece
            self.device.upload(address + start, self._staging[turn].address, len(piece), self.copies)
            self.device.record(self._copied[turn], self.copies)
            self._pieces += 1
