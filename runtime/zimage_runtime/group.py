"""Requests that run together, stage by stage: all prompts are encoded, then all latents denoised, then all decoded.

Where stages take turns in memory, each is loaded once for the whole group. A prompt that several requests share is
encoded once. Each image is the one that its request gives alone, byte for byte: a group is planned so that nothing that
decides an image's bits changes, and is cut where it would.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .arrays import FloatArray
from .errors import DeviceLostError, ExecutorError, MemoryLimitError, RequestError, ZImageRuntimeError
from .events import EncodeEvent, Event
from .executors.choose import Chosen, ExecutorChoice
from .executors.protocol import Control, Denoiser, Executor, Plan, Session
from .images.img2img import Encoded
from .job import Job, computed_by
from .stages import Stages, TokenIds, caption_event

_Key = tuple[object, ...]


@dataclass(frozen=True)
class JobGroup:
    """Jobs for one image each, of one size and with the same LoRA, and the plan that serves all of them."""

    jobs: tuple[Job, ...]
    executor: Executor
    plan: Plan


@dataclass(frozen=True)
class GroupEvent:
    """What happened to one job of a group."""

    index: int  # of the job
    event: Event


class JobError(ZImageRuntimeError):
    """One job of a group failed; the others may be run without it."""

    def __init__(self, index: int, error: ZImageRuntimeError) -> None:
        """`index` is the job's; `error` is why it failed."""
        super().__init__(str(error))
        self.index = index
        self.error = error


def plan_group(jobs: Sequence[Job], choice: ExecutorChoice) -> JobGroup:
    """Plans the first of several jobs together: as many as go together and are computed as each would be alone.

    Raises `RequestError` for a job of several images, and `MemoryLimitError` where the first job alone does not fit.
    """
    if any(len(job.seeds) != 1 for job in jobs):
        raise RequestError("a request in a group is for one image; give a request for each seed")
    number = next((i for i, job in enumerate(jobs) if _shared(job) != _shared(jobs[0])), len(jobs))
    while True:
        first = tuple(jobs[:number])
        try:
            chosen = _planned(first, choice)
        except MemoryLimitError:
            if number == 1:
                raise
        else:
            if number == 1 or all(_same(chosen, job) for job in first):
                return JobGroup(first, chosen.executor, chosen.plan)
        number //= 2


def _shared(job: Job) -> tuple[object, ...]:
    loras = tuple((one.adapter.hash, one.weight) for one in job.loras)
    net = None if job.control is None else job.control.net.manifest.fingerprint
    return job.executor.name, job.geometry, loras, job.work.branches, net


def _planned(jobs: Sequence[Job], choice: ExecutorChoice) -> Chosen:
    works = [job.work for job in jobs]
    work = replace(
        works[0],
        tokens=max(work.tokens for work in works),
        steps=max(work.steps for work in works),
        guided=any(work.guided for work in works),
        encodes=any(work.encodes for work in works),
        count=len(jobs),
    )
    chosen = choice.plan(work)
    waiting = len({_key(job) for job in jobs})
    # while everything stays loaded, one job's conditionings are made when it begins; else all of them before the steps
    return chosen if chosen.plan.group == 1 or waiting == 1 else choice.plan(replace(work, waiting=waiting))


def _same(chosen: Chosen, job: Job) -> bool:
    """Whether a plan for several jobs computes this one as its own plan would."""
    computed = chosen.executor.computation(chosen.plan)
    return computed_by(job.info, chosen.executor.name, computed) == job.info and (
        chosen.plan.how_tiled == job.plan.how_tiled
    )


def _key(job: Job) -> _Key:
    """What decides a job's denoisers, in a group."""
    info, control = job.info, job.control
    seen = () if control is None else (info.control, info.control_type, control.scale, control.steps)
    kept = (info.image, info.mask, info.mask_grow) if job.inpaints_by_control else ()
    return job.prompt_ids, job.schedule.timesteps.tobytes(), seen, kept


def group_events(
    stages: Stages,
    group: JobGroup,
    session: Session,
    finished: Mapping[int, FloatArray],
    enough: Callable[[], bool],
) -> Iterator[GroupEvent]:
    """Runs a group in an open session: see `Pipeline.run_group`."""
    latents = dict(finished)
    waiting = {index: job for index, job in enumerate(group.jobs) if index not in latents}
    sources: dict[int, Encoded | None] = {}
    controls: dict[int, Control | None] = {}
    for index, job in waiting.items():
        begin = time.perf_counter()
        with _blaming(index):
            sources[index], controls[index] = stages.encoded_source(job, session), stages.control(job, session)
        if sources[index] is not None or controls[index] is not None:
            yield GroupEvent(index, EncodeEvent(time.perf_counter() - begin))
    encoded: dict[TokenIds, FloatArray] = {}
    for index, job in waiting.items():
        begin = time.perf_counter()
        with _blaming(index):
            for ids in job.prompt_ids:
                encoded[ids] = stages.hidden_states(session, ids)
        yield GroupEvent(index, caption_event(job, time.perf_counter() - begin))
    if waiting:
        stages.keep_prompts(encoded)
    denoisers: dict[_Key, tuple[Denoiser, ...]] = {}
    if group.plan.group > 1:
        for index, job in waiting.items():
            with _blaming(index):
                if _key(job) not in denoisers:
                    denoisers[_key(job)] = stages.denoisers(job, session, encoded, controls[index])
    for number, (index, job) in enumerate(waiting.items()):
        if number and enough():
            break
        with _blaming(index):
            if _key(job) not in denoisers:  # where all of them are made before, this is not reached
                denoisers = {_key(job): stages.denoisers(job, session, encoded, controls[index])}
            steps = stages.denoised(job, denoisers[_key(job)], range(1), sources[index])
        while True:
            with _blaming(index):
                try:
                    event = next(steps)
                except StopIteration as end:
                    latents[index] = end.value[0]
                    break
            yield GroupEvent(index, event)
    for index in sorted(latents):
        with _blaming(index):
            image = stages.decoded(group.jobs[index], session, 0, latents.pop(index))
        yield GroupEvent(index, image)


@contextmanager
def _blaming(index: int) -> Iterator[None]:
    """Says which job an error is of. A device that is lost is lost for all of them."""
    try:
        yield
    except DeviceLostError:
        raise
    except (ExecutorError, RequestError) as error:
        raise JobError(index, error) from error
