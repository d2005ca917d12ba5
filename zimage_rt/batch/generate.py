"""Generates items on a pipeline, in groups, stage by stage: what one machine does, or one worker of many.

Latents are kept in the store as soon as they are finished, and images as soon as they are decoded, so that the process
may end at any moment.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from zimage_runtime.errors import RequestError
from zimage_runtime.events import ImageEvent, StepEvent
from zimage_runtime.group import GroupEvent, JobError, JobGroup
from zimage_runtime.images.formats import ImageFormat
from zimage_runtime.images.image_files import encode_image
from zimage_runtime.job import Job
from zimage_runtime.pipeline import Pipeline

from .items import Item
from .records import Latents, Record, remove_latents, spool, spooled, write_record
from .store import Store

MOST_SECONDS = 600.0
"""After which a group begins no other row's steps: what is denoised is decoded first."""


@dataclass(frozen=True)
class Steps:
    """Some of an item's steps are done."""

    key: str  # of the item
    count: int


@dataclass(frozen=True)
class Failure:
    """A row that could not be generated."""

    key: str
    why: str


Outcome = Record | Failure


@dataclass
class ImageGenerator:
    """Generates items into a store."""

    pipeline: Pipeline
    store: Store
    metadata: bool = True
    most_seconds: float = MOST_SECONDS
    clock: Callable[[], float] = time.monotonic
    _jobs: dict[str, Job] = field(default_factory=dict, repr=False)  # that are prepared, by the key of their item

    def run(self, group: Sequence[Item]) -> Iterator[Steps | Outcome]:
        """Generates a group, and says what is done as soon as it is.

        Raises `OSError` where nothing can be written, and errors that all rows share.
        """
        waiting = {item.key: item for item in group}
        while waiting:
            for event in self._run(list(waiting.values())):
                if not isinstance(event, Steps):
                    del waiting[event.key]
                yield event
        self._jobs = {}

    def _run(self, items: list[Item]) -> Iterator[Steps | Outcome]:
        """Runs as many of some items as go together; at least one of them comes to an end."""
        prepared: list[Item] = []
        for item in items:
            try:
                self._jobs[item.key] = self._prepared(item)
                prepared.append(item)
            except RequestError as error:
                yield Failure(item.key, str(error))
        if not prepared:
            return
        try:
            group = self.pipeline.group([self._jobs[item.key] for item in prepared])
        except RequestError as error:
            yield Failure(prepared[0].key, str(error))
            return
        kept = {index: spooled(self.store, item.key) for index, item in enumerate(prepared[: len(group.jobs)])}
        try:
            yield from self._images(prepared, group, {index: one for index, one in kept.items() if one is not None})
        except JobError as error:
            yield Failure(prepared[error.index].key, str(error))

    def _prepared(self, item: Item) -> Job:
        job = self._jobs.get(item.key)
        if job is not None and job.executor is self.pipeline.choice.current:
            return job
        return self.pipeline.prepare(item.request.request())

    def _images(self, items: Sequence[Item], group: JobGroup, kept: dict[int, Latents]) -> Iterator[Steps | Outcome]:
        begin = last = self.clock()
        seconds = {index: kept[index].seconds if index in kept else 0.0 for index in range(len(group.jobs))}
        events: Iterator[GroupEvent] = self.pipeline.run_group(
            group,
            finished={index: one.values for index, one in kept.items()},
            enough=lambda: self.clock() - begin > self.most_seconds,
        )
        for one in events:
            now = self.clock()
            seconds[one.index] += now - last
            item, event = items[one.index], one.event
            if isinstance(event, StepEvent):
                if event.step == event.steps:
                    latents = Latents(event.latents[0], group.jobs[one.index].info, seconds[one.index])
                    spool(self.store, item.key, latents)
                yield Steps(item.key, 1)
            elif isinstance(event, ImageEvent):
                info = kept[one.index].info if one.index in kept else event.info
                data = encode_image(event.image, ImageFormat.PNG, info if self.metadata else None)
                record = Record(
                    id=item.id,
                    request=item.request.document(),
                    seed=item.seed,
                    file=item.file,
                    size=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    seconds=round(seconds[one.index] + self.clock() - now, 3),
                    executor=info.executor,
                    key=item.key,
                )
                write_record(self.store, record)
                self.store.write(record.file, data)
                remove_latents(self.store, item.key)
                yield record
            last = self.clock()
