"""A job as the web process sees it: its state, and a log of events that any number of readers follow.

Readers keep a position in the log instead of a queue of their own, so a slow one costs nothing. Of the previews of an
image, the log holds the latest alone. Everything here happens on the event loop's thread.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from .orders import Made, Order, Stepped


class State(StrEnum):
    """What a job is at."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


class EventName(StrEnum):
    """The events of a job, by their names in the event stream."""

    QUEUED = "queued"
    STARTED = "started"
    NOTICE = "notice"
    STEP = "step"
    IMAGE = "image"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job."""

    number: int  # from 1
    name: EventName
    what: Any = None  # an `int`, `Stepped`, `Made`, or a text


@dataclass(eq=False)
class Job:
    """One request for images."""

    order: Order
    client: str  # an address
    lane: str  # of the fair queue
    route: str  # which API it came by
    state: State = State.WAITING
    position: int = 0  # in the queue, from 1; 0 once it runs
    error: str | None = None
    refused: bool = False  # it failed because of what was asked
    step: int = 0  # taken, of all images
    steps: int = 0  # of all images
    began: bool = False  # the engine has checked and planned it
    attempts: int = 0
    cancelling: bool = False  # the engine was told to stop
    text_tokens: int = 0  # of the prompt
    image_tokens: int = 0  # of each image
    notices: list[str] = field(default_factory=list)
    images: list[Made] = field(default_factory=list)
    latest: Stepped | None = None  # with its preview
    began_at: float = 0.0  # by the monotonic clock, in seconds
    pins: int = 0  # readers of its image files, which stay as long
    events: list[JobEvent] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def id(self) -> str:
        """An unguessable name."""
        return self.order.id

    @property
    def eta(self) -> float:
        """Seconds until it is over, by the steps so far; 0 where there are none."""
        if not self.step or self.state is not State.RUNNING:
            return 0.0
        return (time.monotonic() - self.began_at) / self.step * (self.steps - self.step)

    def publish(self, name: EventName, what: Any = None) -> None:
        """Adds an event to the log and wakes its readers."""
        if name is EventName.STEP:
            self._forget_preview(what.index)
        self.events.append(JobEvent(len(self.events) + 1, name, what))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _forget_preview(self, index: int) -> None:
        for at in range(len(self.events) - 1, -1, -1):
            event = self.events[at]
            if isinstance(event.what, Stepped) and event.what.index == index:
                self.events[at] = replace(event, what=replace(event.what, preview=None))
                return

    def end(self, state: State, error: str | None = None, *, refused: bool = False) -> None:
        """The last event. A job that is over stays what it is."""
        if self.state.over:
            return
        self.state, self.error, self.refused = state, error, refused
        self.latest, self.position = None, 0
        self.order = replace(self.order, wanted=self.order.wanted.without_sources())
        self.publish(EventName(state.value), error)

    async def follow(self, after: int = 0) -> AsyncIterator[JobEvent]:
        """Events from number `after` + 1 on, until the last one."""
        while True:
            changed = self._changed
            while after < len(self.events):
                event = self.events[after]
                after += 1
                yield event
            if self.state.over and after >= len(self.events):
                return
            if changed is self._changed:
                await changed.wait()

    async def over(self) -> None:
        """Waits for the end."""
        while not self.state.over:
            await self._changed.wait()

    async def left(self) -> None:
        """Waits until the job is no longer at work: over, or back in the queue."""
        while self.state is State.RUNNING:
            await self._changed.wait()

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """While the block runs, the files of its images are not removed to make room, and partial images are kept."""
        self.pins += 1
        try:
            yield
        finally:
            self.pins -= 1
            if not self.pins and self.state.over:
                self.events = [
                    replace(event, what=replace(event.what, partial=None)) if isinstance(event.what, Stepped) else event
                    for event in self.events
                ]


def new_id() -> str:
    """A name that nobody can guess: 128 random bits."""
    return secrets.token_hex(16)
