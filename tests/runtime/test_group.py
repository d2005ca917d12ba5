"""Requests that run together: the images of single runs to the byte, each stage once, and errors that name a job."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_executor
from facts import raises_with
from group_tools import grouped, images, singles
from PIL import Image

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import CancelledError, DeviceLostError, ExecutorError, MemoryLimitError, RequestError
from zimage_runtime.events import CaptionEvent, EncodeEvent, ImageEvent, Request, StepEvent
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.executors.protocol import Work
from zimage_runtime.group import JobError
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline

SIZE = (64, 48)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "source.png")
    return tmp_path / "source.png"


@pytest.fixture
def requests(source: Path) -> list[Request]:
    """Of one size: seeds of one prompt, other steps and samplers, guidance, a source image."""
    return [
        Request("a fox", size=SIZE, steps=2, seed=1),
        Request("a fox", size=SIZE, steps=2, seed=2),
        Request("a lighthouse " * 9, size=SIZE, steps=3, seed=3, sampler="heun"),
        Request("a fox", size=SIZE, steps=2, seed=4, cfg_scale=2.5, negative="a hen"),
        Request("a hen", size=SIZE, steps=4, seed=5, image=source, strength=0.5),
        Request("a hen", size=SIZE, steps=2, seed=6, scheduler="beta", shift=2.0, variation=(9, 0.4)),
    ]


@pytest.fixture
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle, "cpu") as opened:
        yield opened


@pytest.fixture
def toy(bundle: Path) -> Iterator[Pipeline]:
    """An executor whose stages take turns."""
    opened = Bundle.open(bundle)
    with Pipeline.on(opened, toy_executor.ToyExecutor(opened)) as made:
        yield made


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that ran, in order."""
    found: list[Program] = []
    run = HostPrograms.run

    def running(one: HostPrograms, program: Program, *rest: Any) -> Any:
        found.append(program)
        return run(one, program, *rest)

    monkeypatch.setattr(HostPrograms, "run", running)
    return found


@pytest.mark.parametrize("name", ["pipeline", "toy"])
def test_a_groups_images_are_those_of_single_runs(
    name: str, requests: list[Request], request: pytest.FixtureRequest
) -> None:
    pipeline: Pipeline = request.getfixturevalue(name)
    expected = singles(pipeline, requests)
    assert len(set(expected.values())) == len(requests)
    group = grouped(pipeline, requests)
    assert len(group.jobs) == len(requests)
    assert images(pipeline.run_group(group)) == expected


def test_each_stage_runs_for_all_before_the_next(toy: Pipeline, requests: list[Request], ran: list[Program]) -> None:
    kinds = [type(one.event) for one in toy.run_group(grouped(toy, requests))]
    order = [EncodeEvent, CaptionEvent, StepEvent, ImageEvent]
    assert kinds == sorted(kinds, key=order.index)
    assert Counter(kinds) == {EncodeEvent: 1, CaptionEvent: 6, StepEvent: 2 + 2 + 3 + 2 + 2 + 2, ImageEvent: 6}
    stages = [Program.ENCODER, Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER, Program.DECODER]
    seen = [program for program in ran if program is not Program.MODULATION]
    assert seen == sorted(seen, key=stages.index)


def test_a_prompt_is_encoded_once_however_many_seeds_it_has(pipeline: Pipeline, ran: list[Program]) -> None:
    requests = [Request("a fox", size=SIZE, steps=1, seed=seed) for seed in range(5)]
    requests.append(Request("a hen", size=SIZE, steps=1, seed=1))
    assert len(images(pipeline.run_group(grouped(pipeline, requests)))) == 6
    assert Counter(ran)[Program.TEXT_ENCODER] == 2
    assert Counter(ran)[Program.CAPTION] == 2
    ran.clear()
    again = [Request("a hen", size=(32, 32), steps=1, seed=2)]  # another group, which starts with the same prompt
    images(pipeline.run_group(grouped(pipeline, again)))
    assert Program.TEXT_ENCODER not in ran


def test_finished_latents_are_only_decoded(pipeline: Pipeline, requests: list[Request], ran: list[Program]) -> None:
    group = grouped(pipeline, requests)
    latents = {}
    for one in pipeline.run_group(group):
        if isinstance(one.event, StepEvent) and one.event.step == one.event.steps:
            latents[one.index] = one.event.latents[0]
    expected = images(pipeline.run_group(group))
    ran.clear()
    del latents[0]
    assert images(pipeline.run_group(grouped(pipeline, requests), finished=latents)) == expected
    assert Counter(ran)[Program.DENOISER] == 2
    ran.clear()
    latents = {1: latents[1]}
    assert set(images(pipeline.run_group(pipeline.group(group.jobs[:2]), finished=latents))) == {0, 1}
    assert Program.ENCODER not in ran


def test_what_is_left_out_when_it_is_enough(pipeline: Pipeline, requests: list[Request]) -> None:
    answers = iter([False, True])
    events = list(pipeline.run_group(grouped(pipeline, requests), enough=lambda: next(answers)))
    assert {one.index for one in events if isinstance(one.event, StepEvent)} == {0, 1}
    assert set(images(iter(events))) == {0, 1}


def test_the_first_job_runs_however_soon_it_is_enough(pipeline: Pipeline, requests: list[Request]) -> None:
    assert set(images(pipeline.run_group(grouped(pipeline, requests), enough=lambda: True))) == {0}


def test_a_group_ends_where_the_size_changes(pipeline: Pipeline) -> None:
    sizes = [(64, 48), (64, 48), (48, 64), (64, 48)]
    group = grouped(pipeline, [Request("a fox", size=size, steps=1, seed=1) for size in sizes])
    assert [job.geometry.width for job in group.jobs] == [64, 64]


def test_a_group_is_of_single_images(pipeline: Pipeline) -> None:
    with raises_with(RequestError, "one image", "seed"):
        grouped(pipeline, [Request("a fox", size=SIZE, steps=1, seed=1, count=2)])


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_group_that_does_not_fit_is_cut(
    toy: Pipeline, requests: list[Request], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Prompts of a group wait on the device: with too many, no plan is found."""
    plan = toy_executor.ToyExecutor.plan

    def limited(executor: Any, work: Work) -> Any:
        if work.waiting > most:
            raise MemoryLimitError("too many")
        return plan(executor, work)

    monkeypatch.setattr(toy_executor.ToyExecutor, "plan", limited)
    group = grouped(toy, [Request(f"a fox {n}", size=SIZE, steps=1, seed=n) for n in range(6)])
    assert 1 <= len(group.jobs) <= most
    assert len(group.jobs) * 4 > most


def test_a_group_whose_plan_would_change_the_bits_is_cut(
    toy: Pipeline, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = toy_executor.ToyExecutor.plan
    monkeypatch.setattr(
        toy_executor.ToyExecutor,
        "plan",
        lambda executor, work: replace(plan(executor, work), how_tiled="in tiles" if work.count > 2 else ""),
    )
    assert len(grouped(toy, requests).jobs) in (1, 2)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, program: Program, nth: int) -> None:
    """The nth run of a program raises."""
    run, count = HostPrograms.run, 0

    def running(one: HostPrograms, which: Program, feeds: Mapping[str, Any], *rest: Any) -> Any:
        nonlocal count
        count += which is program
        if which is program and count == nth:
            raise error
        return run(one, which, feeds, *rest)

    monkeypatch.setattr(HostPrograms, "run", running)


@pytest.mark.parametrize(
    ("program", "nth", "index"),
    [
        (Program.ENCODER, 1, 4),
        (Program.TEXT_ENCODER, 2, 2),
        (Program.CAPTION, 2, 2),
        (Program.DENOISER, 4, 1),
        (Program.DECODER, 6, 5),
    ],
)
def test_an_error_names_its_job(
    pipeline: Pipeline,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    program: Program,
    nth: int,
    index: int,
) -> None:
    group = grouped(pipeline, requests)
    expected = images(pipeline.run_group(group))
    pipeline.forget_prompt()
    with monkeypatch.context() as patch:
        failing(patch, ExecutorError("no luck"), program, nth)
        with raises_with(JobError, "no luck") as caught:
            list(pipeline.run_group(group))
    assert caught.value.index == index  # type: ignore[attr-defined]
    assert not pipeline.executor.loaded  # type: ignore[attr-defined]
    assert images(pipeline.run_group(group)) == expected


@pytest.mark.parametrize("error", [DeviceLostError("gone"), CancelledError()])
def test_what_is_no_jobs_fault_comes_as_it_is(
    pipeline: Pipeline, requests: list[Request], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing(monkeypatch, error, Program.DENOISER, 3)
    with raises_with(type(error), str(error)):
        list(pipeline.run_group(grouped(pipeline, requests)))


def test_a_group_can_be_cancelled(pipeline: Pipeline, requests: list[Request]) -> None:
    events = pipeline.run_group(grouped(pipeline, requests))
    next(one for one in events if isinstance(one.event, StepEvent))
    pipeline.cancel()
    with raises_with(CancelledError, "cancelled"):
        list(events)
    prepared = grouped(pipeline, requests)
    pipeline.cancel()
    with raises_with(CancelledError, "cancelled"):
        list(pipeline.run_group(prepared))
