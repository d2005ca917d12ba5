"""What a pipeline keeps, frees, encodes and counts: over several requests, in groups, and when it is left early."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from facts import raises_with

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import CancelledError, DeviceLostError, ExecutorError, MemoryLimitError, RequestError
from zimage_runtime.executors.ort import cpu_plan
from zimage_runtime.executors.ort.cpu import OrtCpuExecutor
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.executors.protocol import Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import CaptionEvent, ImageEvent, Pipeline, Request, StepEvent

GENERATING = {Program.TEXT_ENCODER, Program.CAPTION, Program.MODULATION, Program.DENOISER, Program.DECODER}


class Loads:
    """Counts what is loaded and run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[Program] = []
        self.ran: list[Program] = []
        load, run = HostPrograms._session, HostPrograms.run

        def loading(one: HostPrograms, program: Program, stop: object) -> object:
            self.loaded.append(program)
            return load(one, program, stop)  # type: ignore[arg-type]

        def running(one: HostPrograms, program: Program, *rest: object) -> object:
            self.ran.append(program)
            return run(one, program, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(HostPrograms, "_session", loading)
        monkeypatch.setattr(HostPrograms, "run", running)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


@pytest.fixture
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle, "cpu") as opened:
        yield opened


def cpu(pipeline: Pipeline) -> OrtCpuExecutor:
    executor = pipeline.executor
    assert isinstance(executor, OrtCpuExecutor)
    return executor


# Memory that is the pipeline's own


def test_what_a_pipeline_holds_itself_does_not_count_as_taken(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of which everything is taken as soon as the pipeline has loaded it."""
    request = Request("a fox", size=(64, 64), steps=1, seed=1)
    whole = pipeline.prepare(request).plan
    assert isinstance(whole, cpu_plan.MemoryPlan)
    assert whole.keep_all
    room = whole.peak + sum(whole.programs.values())

    def available() -> int:
        return room - sum(whole.programs[program] for program in cpu(pipeline).loaded)

    monkeypatch.setattr(cpu_plan, "available_memory", available)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: type("Info", (), {"rss": 1 << 40})())
    list(pipeline.run(pipeline.prepare(request)))
    assert cpu(pipeline).loaded == GENERATING
    again = pipeline.prepare(request).plan
    assert isinstance(again, cpu_plan.MemoryPlan)
    assert (again.available, again.keep_all, again.tiled) == (room, True, False)


def test_a_system_that_does_not_describe_the_process_can_generate(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox without /proc. What holds nothing need not ask."""

    def unknown(pid: int | None = None) -> psutil.Process:
        raise psutil.NoSuchProcess(os.getpid())

    monkeypatch.setattr(psutil, "Process", unknown)
    with Pipeline.from_bundle(bundle, "cpu", keep_loaded=False) as opened:
        for _ in range(2):
            assert len(opened.generate("a fox", size=(32, 32), steps=1).images) == 1


def test_no_more_is_counted_as_its_own_than_the_process_has(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("a fox", size=(64, 64), steps=1, seed=1)
    list(pipeline.run(pipeline.prepare(request)))
    monkeypatch.setattr(cpu_plan, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: type("Info", (), {"rss": 1000})())
    plan = pipeline.prepare(request).plan
    assert isinstance(plan, cpu_plan.MemoryPlan)
    assert plan.available == (1 << 40) + 1000


def test_images_that_the_caller_holds_are_counted(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Request("a fox", size=(512, 512), steps=1, seed=1)
    streamed = pipeline.prepare(one).plan.peak
    assert pipeline.prepare(one, keeps_images=True).plan.peak == streamed + 3 * 512 * 512
    monkeypatch.setattr(cpu_plan, "available_memory", lambda: streamed + 100 * 3 * 512 * 512)
    many = Request("a fox", size=(512, 512), steps=1, seed=1, count=1000)
    pipeline.prepare(many)  # a stream hands each image over
    with raises_with(MemoryLimitError, "512x512", 1000):
        pipeline.generate("a fox", size=(512, 512), steps=1, seed=1, count=1000)


# Groups


def test_where_stages_take_turns_each_is_loaded_once_for_a_group(
    bundle: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.from_bundle(bundle, "cpu") as roomy:
        expected = roomy.generate("a fox", size=(64, 64), steps=2, seed=3, count=18)
        assert [loads.loaded.count(program) for program in (Program.DENOISER, Program.DECODER)] == [1, 1]
        plan = roomy.prepare(Request("a fox", size=(64, 64), count=18), keeps_images=True).plan
    loads.loaded.clear()
    monkeypatch.setattr(cpu_plan, "available_memory", lambda: plan.peak)
    with Pipeline.from_bundle(bundle, "cpu") as pipeline:
        found = pipeline.generate("a fox", size=(64, 64), steps=2, seed=3, count=18)
        # eighteen images are a group of sixteen and one of two
        assert [loads.loaded.count(program) for program in (Program.DENOISER, Program.DECODER)] == [2, 2]
        assert loads.loaded.count(Program.TEXT_ENCODER) == 1
        loads.loaded.clear()
        pipeline.generate("a hen", size=(64, 64), steps=1, seed=3, count=4)
        assert sorted(loads.loaded) == sorted(GENERATING), "four images load each stage once"
    assert found.seeds == expected.seeds
    for one, other in zip(found.images, expected.images, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_images_of_a_group_are_handed_over_before_the_next_begins(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.from_bundle(bundle, "cpu") as pipeline:
        plan = pipeline.prepare(Request("a fox", size=(32, 32), count=20, batch_size=4)).plan
        monkeypatch.setattr(cpu_plan, "available_memory", lambda: plan.peak)
        kinds = [
            "image" if isinstance(event, ImageEvent) else "step"
            for event in pipeline.stream("a fox", size=(32, 32), steps=1, seed=0, count=20, batch_size=4)
            if isinstance(event, ImageEvent | StepEvent)
        ]
    assert kinds == ["step"] * 4 + ["image"] * 16 + ["step"] + ["image"] * 4


# The prompt


def test_the_last_prompt_is_encoded_once(pipeline: Pipeline, loads: Loads) -> None:
    def encoded(prompt: str, **options: int) -> int:
        before = loads.ran.count(Program.TEXT_ENCODER)
        list(pipeline.stream(prompt, size=(32, 32), steps=1, **options))
        return loads.ran.count(Program.TEXT_ENCODER) - before

    first = pipeline.generate("a fox", size=(32, 32), steps=1, seed=5).images[0]
    assert [encoded("a fox"), encoded("a fox", seed=3), encoded("a hen"), encoded("a fox")] == [0, 0, 1, 1]
    again = pipeline.generate("a fox", size=(32, 32), steps=1, seed=5).images[0]
    assert again.tobytes() == first.tobytes()
    pipeline.forget_prompt()
    assert encoded("a fox") == 1


# Leaving


@pytest.mark.parametrize("keep_loaded", [True, False])
def test_a_stream_that_is_closed_frees_what_it_may_not_keep(bundle: Path, keep_loaded: bool) -> None:
    with Pipeline.from_bundle(bundle, "cpu", keep_loaded=keep_loaded) as pipeline:
        events = pipeline.stream("a fox", size=(32, 32), steps=4, seed=0)
        assert isinstance(next(events), CaptionEvent)
        next(events)
        assert Program.DENOISER in cpu(pipeline).loaded
        events.close()  # type: ignore[attr-defined]
        assert bool(cpu(pipeline).loaded) == keep_loaded
        assert len(pipeline.generate("a fox", size=(32, 32), steps=1).images) == 1


def test_a_stream_that_fails_frees_everything(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pipeline.stream("a fox", size=(32, 32), steps=4, seed=0)
    next(events)
    run = HostPrograms.run

    def failing(one: HostPrograms, program: Program, *rest: object) -> object:
        if program is Program.DENOISER:
            raise ExecutorError("the denoiser failed, as the test wants it to")
        return run(one, program, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(HostPrograms, "run", failing)
        with raises_with(ExecutorError, "as the test wants it"):
            next(events)
    assert cpu(pipeline).loaded == set()
    assert len(pipeline.generate("a fox", size=(32, 32), steps=1).images) == 1


@pytest.mark.parametrize("keep_loaded", [True, False])
def test_cancelling_from_another_thread_ends_the_stream(bundle: Path, keep_loaded: bool) -> None:
    with Pipeline.from_bundle(bundle, "cpu", keep_loaded=keep_loaded) as pipeline:
        events = pipeline.stream("a fox", size=(64, 64), steps=256, seed=0)
        next(events)
        next(events)
        canceller = threading.Timer(0.05, pipeline.cancel)
        canceller.start()
        with pytest.raises(CancelledError):
            for _ in events:
                pass
        canceller.join()
        assert bool(cpu(pipeline).loaded) == keep_loaded
        assert len(pipeline.generate("a fox", size=(32, 32), steps=1).images) == 1, "cancelling is for one request"


@pytest.mark.parametrize("end", [Pipeline.cancel, Pipeline.close])
def test_what_stops_a_pipeline_stops_streams_that_have_not_begun(
    pipeline: Pipeline, end: Callable[[Pipeline], None]
) -> None:
    waiting = pipeline.stream("a fox", size=(32, 32), steps=1, seed=0)
    end(pipeline)
    with pytest.raises((CancelledError, RequestError)):
        next(waiting)
    assert cpu(pipeline).loaded == set()
    assert len(pipeline.generate("a fox", size=(32, 32), steps=1).images) == 1


def test_a_request_that_is_cancelled_while_it_is_prepared_does_not_run(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = OrtCpuExecutor.plan

    def cancelled(executor: OrtCpuExecutor, work: Work) -> cpu_plan.MemoryPlan:
        pipeline.cancel()
        return plan(executor, work)

    with monkeypatch.context() as preparing:
        preparing.setattr(OrtCpuExecutor, "plan", cancelled)
        with pytest.raises(CancelledError):
            pipeline.generate("a fox", size=(32, 32), steps=1)
    assert cpu(pipeline).loaded == set()


def test_closing_a_pipeline_ends_the_stream_that_runs(pipeline: Pipeline, loads: Loads) -> None:
    events = pipeline.stream("a fox", size=(32, 32), steps=4, seed=0)
    next(events)
    next(events)
    pipeline.close()
    before = list(loads.loaded)
    with pytest.raises(CancelledError):
        list(events)
    assert loads.loaded == before, "a closed executor loaded a program"


def test_a_prompt_that_another_thread_encodes_in_between_is_not_taken_for_ours(pipeline: Pipeline) -> None:
    """The other thread comes at the worst moment: between finding that ours is the kept prompt and taking it."""
    ours, theirs = (tuple(pipeline.token_ids(prompt)) for prompt in ("a fox", "a lighthouse at night"))

    class Interrupted(tuple[int, ...]):
        def __ne__(self, other: object) -> bool:
            pipeline.hidden_states(session, theirs)
            return tuple.__ne__(self, other)

        __hash__ = tuple.__hash__

    work = Work(geometry=image_geometry(32, 32, pipeline.bundle.manifest.config), tokens=len(theirs))
    executor = pipeline.executor
    with executor.session(executor.plan(work)) as session:
        expected = pipeline.hidden_states(session, ours)
        found = pipeline.hidden_states(session, Interrupted(ours))
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_is_told_to_open_its_own(bundle: Path) -> None:
    """In a process of its own: pytest's may have threads that a fork would break."""
    script = """
import os, signal, sys
from zimage_rt import Pipeline
from zimage_runtime.errors import ExecutorError

pipeline = Pipeline.from_bundle(sys.argv[1], "cpu")
pipeline.generate("a fox", size=(32, 32), steps=1)
child = os.fork()
if not child:
    signal.alarm(30)  # ends it where it waits for a thread that it does not have
    try:
        pipeline.generate("a hen", size=(32, 32), steps=1)
    except ExecutorError as error:
        os._exit(42 if "fork" in str(error) else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "42", done.stderr


def test_a_pipeline_closes_itself(bundle: Path) -> None:
    others = set(threading.enumerate())  # of pipelines that other tests have not closed
    with Pipeline.from_bundle(bundle, "cpu") as pipeline:
        pipeline.generate("a fox", size=(32, 32), steps=1)
        executor = cpu(pipeline)
        assert executor.loaded
        (thread,) = [thread for thread in set(threading.enumerate()) - others if thread.name == "zimage cpu"]
    assert not executor.loaded
    assert not thread.is_alive()
    pipeline.close()  # a second time, nothing happens


def test_nothing_is_freed_on_a_device_that_is_lost(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeing may wait for it without end: the error must reach the caller, who ends the process."""
    freed: list[str] = []

    def lost(*arguments: object) -> object:
        freed.clear()  # of what gave way to this stage
        raise DeviceLostError("the device was lost, as the test wants it to be")

    def generate() -> None:
        with Pipeline.from_bundle(bundle, "cpu", keep_loaded=False) as pipeline:
            events = pipeline.stream("a fox", size=(32, 32), steps=2, seed=0)
            next(events)
            monkeypatch.setattr(HostPrograms, "run", lost)
            monkeypatch.setattr(HostPrograms, "release", lambda self, *programs: freed.append("release"))
            list(events)

    with pytest.raises(DeviceLostError):
        generate()
    assert freed == []


def test_an_executor_that_nobody_closes_leaves_no_thread(bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(bundle, "cpu")
    pipeline.generate("a fox", size=(32, 32), steps=1)
    mine = [thread for thread in threading.enumerate() if thread.name == "zimage cpu"]
    del pipeline
    gc.collect()
    for thread in mine:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in mine)


def test_two_streams_of_one_pipeline_take_turns(bundle: Path) -> None:
    with Pipeline.on(Bundle.open(bundle), OrtCpuExecutor(Bundle.open(bundle))) as pipeline:
        expected = [pipeline.generate(prompt, size=(32, 32), steps=3, seed=1).images[0] for prompt in ("a", "b")]
        streams = [pipeline.stream(prompt, size=(32, 32), steps=3, seed=1) for prompt in ("a", "b")]
        images = {}
        for turn in range(5):
            for index, stream in enumerate(streams):
                if isinstance(event := next(stream), ImageEvent):
                    images[index] = event.image
                    assert turn == 4
        for index, image in enumerate(expected):
            assert images[index].tobytes() == image.tobytes()
