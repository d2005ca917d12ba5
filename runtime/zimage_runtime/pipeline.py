"""The way of an image, from request to pixels, as a generator.

The caller gets an event after the caption, after each step and with each image, and so owns progress, previews, timing
and cancelling. `stages` has the stages; here is their order, for a request and for a group of them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from .arrays import FloatArray
from .bundle.bundle import Bundle
from .bundle.hub import bundle_directory
from .errors import CancelledError, DeviceLostError, RequestError
from .events import (
    MAX_COUNT,
    CaptionEvent,
    EncodeEvent,
    Event,
    ImageEvent,
    NoticeEvent,
    Request,
    Result,
    StepEvent,
    Timings,
)
from .executors.choose import ExecutorChoice
from .executors.protocol import Executor, Options, Plan, Session
from .executors.registry import AUTO
from .group import GroupEvent, JobGroup, group_events, plan_group
from .images.pixels import to_image
from .job import Checked, Job
from .keyword_fields import with_fields
from .prepare import check_request, plan_job
from .stages import Stages, caption_event

__all__ = [
    "MAX_COUNT",
    "CaptionEvent",
    "EncodeEvent",
    "Event",
    "ImageEvent",
    "Job",
    "NoticeEvent",
    "Pipeline",
    "Request",
    "Result",
    "StepEvent",
    "Timings",
    "to_image",
]


@dataclass
class Pipeline(Stages):
    """A bundle and what runs it. Make one with `from_bundle`; as a context manager, it closes itself."""

    choice: ExecutorChoice
    _sessions: list[Session] = field(default_factory=list, init=False, repr=False)
    _cancels: int = field(default=0, init=False, repr=False)  # how often `cancel` was called

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        executor: str = AUTO,
        vram: int | None = None,
        *,
        device: int = 0,
        low_memory: bool = False,
        keep_loaded: bool = True,
        trust_engines: bool = False,
        note: Callable[[str], object] = lambda text: None,
    ) -> Self:
        """Opens a bundle: a directory, or a name on the Hub, ``ORG/NAME``, whose files are fetched into the cache
        of huggingface_hub. Nothing large is read yet.

        `executor` is a name from the registry, or "auto": for each request the best that can run it. `vram` is a
        budget in bytes for executors on a GPU, by default what is free there now, and `device` the GPU's number. With
        `low_memory`, weights on the CPU stay mapped from the file. With `keep_loaded`, what fits in memory stays
        loaded between requests. `trust_engines` loads the bundle's own engines for TensorRT, which are code, instead
        of building engines here once: only for a bundle from someone you trust. `note` gets a line for what is done
        once and takes a while.

        Raises `BundleError`, `HubError`, or `RequestError` for an executor that cannot run here.
        """
        bundle = Bundle.open(bundle_directory(path))
        options = Options(
            vram=vram,
            device=device,
            low_memory=low_memory,
            keep_loaded=keep_loaded,
            trust_engines=trust_engines,
            note=note,
        )
        choice = ExecutorChoice(bundle, executor, options)
        choice.open()
        return cls(bundle, choice)

    @classmethod
    def on(cls, bundle: Bundle, executor: Executor) -> Self:
        """A pipeline on an executor that is already open."""
        return cls(bundle, ExecutorChoice.of(bundle, executor))

    @property
    def executor(self) -> Executor:
        """The executor of the last request; before the first one, the best that opens."""
        return self.choice.open()

    @with_fields(Request)
    def generate(self, request: Request) -> Result:
        """Generates the images of a request, whose fields are the arguments: ``generate("a fox", seed=7)``.

        A seed gives the image that diffusers gives with ``torch.Generator("cpu").manual_seed(seed)``. A source image
        is resized to `size`, which by default is its own, cut to multiples of 16. The result holds all images: for
        many, use `stream`.

        Raises `RequestError`, `MemoryLimitError` (both before anything is loaded) or `ExecutorError`.
        """
        start = time.perf_counter()
        caption = encode = 0.0
        steps: list[float] = []
        images: list[ImageEvent] = []
        for event in self.run(self.prepare(request, keeps_images=True)):
            match event:
                case EncodeEvent():
                    encode = event.seconds
                case CaptionEvent():
                    caption = event.seconds
                case StepEvent():
                    steps.append(event.seconds)
                case ImageEvent():
                    images.append(event)
        decode = tuple(event.seconds for event in images)
        timings = Timings(caption, tuple(steps), decode, time.perf_counter() - start, encode)
        return Result([e.image for e in images], [e.seed for e in images], timings, [e.info for e in images])

    @with_fields(Request)
    def stream(self, request: Request) -> Iterator[Event]:
        """The same as `generate`, event by event. The request is checked now, not at the first event."""
        return self.run(self.prepare(request))

    def prepare(self, request: Request, *, keeps_images: bool = False) -> Job:
        """Checks a request against the bundle, reads its images and plans it. Nothing large is loaded.

        `keeps_images` says that the caller holds all images in memory until the end. Raises `RequestError`, or
        `MemoryLimitError` where no executor can hold the request.
        """
        return plan_job(self.check(request), self.choice, cancels=self._cancels, keeps_images=keeps_images)

    def check(self, request: Request) -> Checked:
        """Checks a request against the bundle and reads its images. What cannot be known without an executor, such as
        whether it fits in memory, is left to `prepare`. Raises `RequestError`."""
        return check_request(request, self.bundle, self._prompt, self._loras)

    def group(self, jobs: Sequence[Job]) -> JobGroup:
        """Plans jobs of one image each to run stage by stage in one session: as many of the first ones as have one size
        and the same LoRA, and are computed together exactly as each would be alone.

        Raises `RequestError`, or `MemoryLimitError` where no executor can hold the first job any more.
        """
        return plan_group(jobs, self.choice)

    def run(self, job: Job) -> Iterator[Event]:
        """Generates what was prepared. A stream that is closed early frees what it may not keep.

        Raises `RequestError` for a job whose executor was left for a later request's.
        """
        self._check_open(job.executor)
        return self._run(job)

    def run_group(
        self,
        group: JobGroup,
        *,
        finished: Mapping[int, FloatArray] | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> Iterator[GroupEvent]:
        """Generates what was prepared as a group: source images and prompts are encoded, then steps are taken for one
        job after another, then all latents are decoded. Each event says which job it is of, by its index.

        `finished` has latents of jobs that need no more than decoding, by index: [channels, height / 8, width / 8].
        Before each job's steps but the first, `enough` is asked; once it is true, the other jobs are left out. The
        images are those of single runs, byte for byte.

        Raises what `run` raises; an error that a job alone is to blame for comes as `JobError`, which names it.
        """
        self._check_open(group.executor)
        return self._run_group(group, finished or {}, enough)

    def _check_open(self, executor: Executor) -> None:
        if executor is not self.choice.current:
            raise RequestError(f"the {executor.name} executor was closed since; prepare the request again")

    def _run(self, job: Job) -> Iterator[Event]:
        yield from job.notices
        with self._session(job.executor, job.plan, job.cancels) as session:
            yield from self._events(job, session)

    def _run_group(
        self, group: JobGroup, finished: Mapping[int, FloatArray], enough: Callable[[], bool]
    ) -> Iterator[GroupEvent]:
        cancels = min(job.cancels for job in group.jobs)
        with self._session(group.executor, group.plan, cancels) as session:
            yield from group_events(self, group, session, finished, enough)

    @contextmanager
    def _session(self, executor: Executor, plan: Plan, cancels: int) -> Iterator[Session]:
        """A session that `cancel` reaches, for what was prepared when there had been so many `cancels`."""
        self._check_open(executor)  # again, for a stream may begin long after it was made
        with executor.session(plan) as session:
            self._sessions.append(session)
            try:
                if cancels != self._cancels:  # before the session was there to be cancelled
                    raise CancelledError
                yield session
            finally:
                self._sessions.remove(session)

    def _events(self, job: Job, session: Session) -> Iterator[Event]:
        begin = time.perf_counter()
        encoded, control = self.encoded_source(job, session), self.control(job, session)
        if encoded is not None or control is not None:
            yield EncodeEvent(time.perf_counter() - begin)
        begin = time.perf_counter()
        denoisers = self.denoisers(job, session, self.encoded_prompts(session, job.prompt_ids), control)
        yield caption_event(job, time.perf_counter() - begin)
        whole_batches = max(job.plan.group // job.batch_size, 1) * job.batch_size
        for group in _parts(range(len(job.seeds)), whole_batches):
            finished: list[FloatArray] = []
            for batch in _parts(group, job.batch_size):
                finished.extend((yield from self.denoised(job, denoisers, batch, encoded)))
            for index, one in zip(group, finished, strict=True):
                yield self.decoded(job, session, index, one)

    def cancel(self) -> None:
        """Stops what was asked of this pipeline so far, from any thread: streams, those that have not begun included,
        raise `CancelledError` within moments. Later requests run."""
        self._cancels += 1
        for session in tuple(self._sessions):
            session.cancel()

    def release(self) -> None:
        """Frees all that is loaded; the next image loads it again."""
        self._encoded = {}
        self._loras.forget()
        if self.choice.current is not None:
            self.choice.current.release()

    def close(self) -> None:
        """Cancels what runs, frees everything and writes caches. A later request opens the executor again."""
        self.cancel()
        self._encoded = {}
        self._loras.forget()
        self.choice.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or not issubclass(kind, DeviceLostError):  # whose clean-up may wait without end
            self.close()


def _parts(indices: range, size: int) -> Iterator[range]:
    for first in range(0, len(indices), size):
        yield indices[first : first + size]
