"""From the queue to the engine: one job at a time, cancelled when asked, and the engine started again when it dies."""

import asyncio
import contextlib
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from .engine_process import EngineProcess
from .fair_queue import FairQueue
from .jobs import EventName, Job, State, new_id
from .metrics import Metrics
from .orders import (
    Cancel,
    Ended,
    FromEngine,
    Gone,
    Made,
    Noticed,
    NotReady,
    Planned,
    PlanOrder,
    Ready,
    Staged,
    Started,
    Stepped,
    Stop,
    Wanted,
)
from .refusals import QueueFullError, UnavailableError
from .settings import Settings

OBEYS_WITHIN = 10.0
"""Seconds that the engine gets to stop a job that was cancelled."""

_REMEMBERED = 100  # jobs that are over
_ATTEMPTS = 2  # at a job whose engine ends before the job begins
_STARTS_AT_MOST = 5  # in a row without becoming ready, before requests are refused
_PAUSES = (0.0, 0.5, 2.0, 5.0, 15.0, 60.0)  # seconds before the next start, by failed ones so far


class Supervisor:
    """Owns the engine process and the queue. Everything happens on the event loop's thread."""

    def __init__(self, settings: Settings, metrics: Metrics, finished: Callable[[Job], object]) -> None:
        self.settings = settings
        self.metrics = metrics
        self.ready: Ready | None = None
        self.stopping = False
        self.running: Job | None = None
        self.engine: EngineProcess | None = None
        self._finished = finished
        self._queue: FairQueue[Job] = FairQueue()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._plans: dict[str, asyncio.Future[Planned]] = {}
        self._failed_starts = 0
        self._was_ready = False  # the engine that there is, or was last
        self._first_start: asyncio.Future[None] | None = None
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._typical = 5.0  # seconds of a job, for Retry-After

    async def start(self) -> None:
        """Starts the engine and waits until it is ready. Raises `UnavailableError` if it cannot be."""
        self._first_start = asyncio.get_running_loop().create_future()
        self._start_engine()
        try:
            await self._first_start
        finally:
            self._first_start = None
        self._spawn(self._serve())

    def _start_engine(self) -> None:
        if not self.stopping:
            self.engine = EngineProcess(self.settings.engine, self._hear)

    # --- jobs, from the routes

    def submit(self, job: Job) -> None:
        """Puts a job into the queue. Raises `QueueFullError` or `UnavailableError`."""
        self.check_open()
        limits, waiting = self.settings.limits, len(self._queue)
        if waiting >= limits.max_queue:
            wait = min(max(1, round(self._typical * waiting)), 60)
            raise QueueFullError(f"{waiting} requests wait already; try again later", retry_after=wait)
        if sum(one.order.wanted.source_bytes for one in (job, *self._queue)) > limits.max_sources:
            raise QueueFullError("the requests that wait hold too many source images; try again later", retry_after=30)
        self._queue.put(job.lane, job)
        self._jobs[job.id] = job
        self._number()
        self._wake.set()

    def check_open(self) -> None:
        """Raises `UnavailableError` while no job would be run."""
        if self.stopping:
            raise UnavailableError("the server is stopping", retry_after=10)
        if self._failed_starts >= _STARTS_AT_MOST:
            raise UnavailableError("the engine cannot be started at the moment", retry_after=60)

    def find(self, id: str) -> Job | None:
        """A job that waits, runs, or was over not long ago."""
        return self._jobs.get(id)

    @property
    def waiting(self) -> list[Job]:
        """Jobs in the order in which they will run."""
        return list(self._queue)

    @property
    def jobs(self) -> list[Job]:
        """All that are remembered, oldest first."""
        return list(self._jobs.values())

    def cancel(self, job: Job) -> None:
        """Cancels a job. One that runs stops at the next operator; an engine that does not obey is ended."""
        if self._queue.remove(job):
            self._end(job, State.CANCELLED, "cancelled")
            self._number()
        elif job is self.running and not job.state.over:
            job.cancelling = True
            self._spawn(self._cancel_running(job))

    async def _cancel_running(self, job: Job) -> None:
        engine = self.engine
        if engine is None:
            return
        try:
            async with asyncio.timeout(OBEYS_WITHIN):
                await engine.say(Cancel(job.id))
                await job.over()
        except TimeoutError:
            if job is self.running:
                self.ready = None  # no other job goes there
                self._end(job, State.CANCELLED, "cancelled")
                engine.kill()

    async def plan(self, wanted: Wanted) -> Planned:
        """What an image would take. Raises `UnavailableError` where the engine does not answer."""
        engine = self.engine
        if engine is None or self.ready is None:
            raise UnavailableError("the engine is starting", retry_after=2)
        order = PlanOrder(new_id(), wanted)
        answer = self._plans[order.id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(30):
                await engine.say(order)
                planned: Planned = await answer
                return planned
        except TimeoutError:
            raise UnavailableError("the engine does not answer", retry_after=5) from None
        finally:
            self._plans.pop(order.id, None)

    # --- the loop

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.running is None and self.ready is not None and (job := self._queue.take()):
                engine = self.engine
                assert engine is not None
                self.running = job
                job.state, job.position, job.attempts = State.RUNNING, 0, job.attempts + 1
                self._number()
                begin = time.monotonic()
                await engine.say(job.order)
                await job.left()
                if job is self.running:  # the engine is free, and not gone
                    self.running = None
                self._typical += 0.2 * (time.monotonic() - begin - self._typical)

    def _number(self) -> None:
        """Says to each job that waits where it stands."""
        for position, job in enumerate(self._queue, 1):
            if job.position != position:
                job.position = position
                job.publish(EventName.QUEUED, position)

    def _end(self, job: Job, state: State, error: str | None = None, *, refused: bool = False) -> None:
        if job.state.over:
            return
        job.end(state, error, refused=refused)
        self.metrics.jobs[job.route, state.value] += 1
        self._finished(job)
        over = [id for id, one in self._jobs.items() if one.state.over]
        for id in over[:-_REMEMBERED]:
            del self._jobs[id]

    def _hear(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self.ready, self._was_ready, self._failed_starts = message, True, 0
                self._answer_start(None)
                self._wake.set()
            case NotReady():
                self._answer_start(message.message)
            case Gone():
                self._gone(message.exit_code)
            case Planned():
                answer = self._plans.get(message.id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case _ if self.running is not None and self.running.id == message.id:
                self._about(self.running, message)

    def _about(self, job: Job, message: Started | Noticed | Staged | Stepped | Made | Ended) -> None:
        match message:
            case Ended():
                if job.state.over:  # cancelled, and killed for being late
                    return
                if message.cancelled:
                    self._end(job, State.CANCELLED, message.error)
                elif message.error is not None:
                    self._end(job, State.FAILED, message.error, refused=message.refused)
                else:
                    self._end(job, State.DONE)
            case _ if job.state.over:
                return
            case Started():
                job.steps = message.steps * job.order.wanted.count
                job.image_tokens = message.image_tokens
                job.began, job.began_at = True, time.monotonic()
                job.publish(EventName.STARTED)
            case Noticed():
                job.notices.append(message.text)
                job.publish(EventName.NOTICE, message.text)
            case Staged():
                self.metrics.stage(message.stage, message.seconds)
                job.text_tokens = message.tokens or job.text_tokens
            case Stepped():
                self.metrics.stage("step", message.seconds)
                job.step += 1
                job.latest = message
                job.publish(EventName.STEP, message)
            case Made():
                self.metrics.images += 1
                job.images.append(message)
                job.publish(EventName.IMAGE, message)

    def _gone(self, exit_code: int | None) -> None:
        """The engine has ended: the job at work fails, and another engine is started."""
        was_ready, self._was_ready = self._was_ready, False
        self.ready, self.engine = None, None
        job, self.running = self.running, None
        if job is not None and job.cancelling:
            self._end(job, State.CANCELLED, "cancelled")
        elif job is not None and not job.began and job.attempts < _ATTEMPTS and not self.stopping:
            self._put_back(job)  # it may have come to an engine that was ending already
        elif job is not None:
            cause = (
                "the server was stopped"
                if self.stopping
                else f"the engine ended ({_cause(exit_code)}); it is started again"
            )
            self._end(job, State.FAILED, cause)
        for answer in self._plans.values():
            if not answer.done():
                answer.set_exception(UnavailableError("the engine ended; it is started again", retry_after=5))
        if self._first_start is not None:
            self._answer_start(f"the engine ended while it started ({_cause(exit_code)})")
        elif not self.stopping:
            self._failed_starts += not was_ready
            self.metrics.restarts += 1
            if self._failed_starts == _STARTS_AT_MOST:
                self._fail_waiting("the engine cannot be started at the moment")
            self._spawn(self._start_again())

    def _put_back(self, job: Job) -> None:
        job.state = State.WAITING
        self._queue.put_first(job.lane, job)
        self._number()

    async def _start_again(self) -> None:
        while True:
            await asyncio.sleep(_PAUSES[min(self._failed_starts, len(_PAUSES) - 1)])
            try:
                self._start_engine()
            except OSError:  # no memory or no process to be had now
                self._failed_starts += 1
                continue
            return

    def _answer_start(self, error: str | None) -> None:
        if self._first_start is None or self._first_start.done():
            return
        if error is None:
            self._first_start.set_result(None)
        else:
            self._first_start.set_exception(UnavailableError(error))

    # --- the end

    def refuse_more(self) -> None:
        """The server stops: what waits is returned, and nothing new is taken."""
        self.stopping = True
        self._fail_waiting("the server is stopping")

    def _fail_waiting(self, why: str) -> None:
        for job in self.waiting:
            self._queue.remove(job)
            self._end(job, State.FAILED, why)

    def hurry(self) -> None:
        """The job at work gets no more time."""
        self._hurry.set()

    async def stop(self) -> None:
        """Lets the job at work finish in its time, then ends the engine."""
        self.refuse_more()
        job, hurry = self.running, self._hurry
        if job is not None:
            waits = [asyncio.ensure_future(job.over()), asyncio.ensure_future(hurry.wait())]
            await asyncio.wait(waits, timeout=self.settings.grace, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if not job.state.over and not hurry.is_set():
                await self._cancel_running(job)
        engine = self.engine
        if engine is not None and hurry.is_set():
            engine.kill()
        elif engine is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OBEYS_WITHIN):
                    await engine.say(Stop())
                    while self.engine is not None:
                        await asyncio.sleep(0.02)
            if self.engine is not None:
                engine.kill()
        for task in tuple(self._tasks):
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = f"signal {-exit_code}"
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
    return f"status {exit_code}"
