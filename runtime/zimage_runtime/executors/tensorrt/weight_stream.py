"""The blocks of a stage on the device: resident ones, and streamed ones that take turns in two slots.

A streamed block's way: host memory → staging (pinned) → slot → computed with → the slot is free. Two streams run at
once; these events order them:

- `ready[slot]`, on the copy stream after a slot is written: computing waits for it, and so does the host before it
  writes to that slot's staging buffer again;
- `done[slot]`, on the compute stream after the slot's block was computed with: the next copy into it waits for it.

The copy of the block after next is queued as soon as the next one is in use. In a stage that passes through its
blocks again and again, also across the end of a pass, so that the first blocks are there when the next one begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .arena import Arena
from .device import Device, DeviceEvent, Pinned, Stream
from .plan import SLOTS, StagePlan

Fill = Callable[[int, NDArray[np.uint8]], None]
"""Writes the weights of a block, by its index, into a buffer of its size."""


@dataclass
class BlockStack:
    """The blocks of one stage. `load` first; then each pass asks for every block in order, and says when it is done."""

    device: Device
    arena: Arena
    plan: StagePlan
    fill: Fill
    compute: Stream
    copies: Stream
    wraps: bool = False  # passes follow one another
    pin_streamed: bool = False  # hold all streamed blocks in pinned memory, so that no step reads them anew
    _addresses: dict[int, int] = field(default_factory=dict)
    _slots: list[int] = field(default_factory=list)
    _staging: list[Pinned] = field(default_factory=list)
    _ready: list[DeviceEvent] = field(default_factory=list)
    _done: list[DeviceEvent] = field(default_factory=list)
    _pinned: dict[int, Pinned] = field(default_factory=dict)
    _queued: int = 0  # copies of streamed blocks so far; copy n goes to slot n % 2
    _used: int = 0  # of which were computed with

    def load(self) -> None:
        """Allocates, and uploads what is resident."""
        sizes, streamed = self.plan.needs.block_bytes, self.plan.streamed
        for index in sorted(self.plan.resident):
            self._addresses[index] = self.arena.allocate(sizes[index])
        self._slots = [self.arena.allocate(self.plan.slot_bytes) for _ in range(SLOTS if streamed else 0)]
        self._staging = [self.arena.pinned(max(sizes, default=0)) for _ in range(SLOTS)]
        self._ready = [self.arena.event() for _ in range(SLOTS)]
        self._done = [self.arena.event() for _ in range(SLOTS)]
        for turn, index in enumerate(sorted(self.plan.resident)):
            self._upload(turn % SLOTS, index, self._addresses[index])
        if not streamed:  # nothing is copied any more
            self.device.synchronize(self.copies)
            for staging in self._staging:
                self.arena.release_pinned(staging)
            self._staging = []
        self._wait_for_residents()

    def _wait_for_residents(self) -> None:
        """Orders all computing after the resident blocks' copies."""
        event = self.arena.event()
        self.device.record(event, self.copies)
        self.device.wait(self.compute, event)

    def begin(self) -> None:
        """A pass begins: the first streamed blocks are on their way, if they were not already."""
        while self.plan.streamed and self._queued - self._used < SLOTS:
            self._queue_next()

    def acquire(self, index: int) -> int:
        """The address of a block's weights, which what is queued on the compute stream from now on may read."""
        if index in self._addresses:
            return self._addresses[index]
        slot = self._used % SLOTS
        self.device.wait(self.compute, self._ready[slot])
        return self._slots[slot]

    def release(self, index: int) -> None:
        """All that reads the block is queued: its slot, if it has one, may be written when that is done."""
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
        staging = self._pinned.get(index)
        if staging is None:
            if self.pin_streamed and index not in self._addresses:
                staging = self._pinned[index] = self.arena.pinned(nbytes)
            else:
                staging = self._staging[turn]
                self.device.synchronize_event(self._ready[turn])
            self.fill(index, staging.data[:nbytes])
        self.device.upload(address, staging.address, nbytes, self.copies)
        self.device.record(self._ready[turn], self.copies)
