"""The tensorrt executor on a stand-in device that runs the float32 twins of its block programs: no GPU.

Its output is compared with the `cpu` executor, so this is also the proof that the chain of block programs, fed with
the weights by name through all layers, is the model: text encoder, caption, denoiser and VAE.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest
from device_stand_in import MisuseError, StandInDevice
from executor_tools import CASE, EVERYTHING, TOLERANCE, Make, least, sizes_of, work_of
from facts import assert_facts, memory_amounts, raises_with
from parity import Case, check_parity, draw, relative_error
from sessions import session

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import ExecutorError, MemoryLimitError, RequestError
from zimage_runtime.events import NoticeEvent
from zimage_runtime.executors.protocol import Work
from zimage_runtime.executors.tensorrt import weight_stream
from zimage_runtime.executors.tensorrt.block_catalog import VariantSpec
from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES, ResidencyPlan, plan_residency, plan_stage
from zimage_runtime.executors.tensorrt.stage_sizes import stage_needs
from zimage_runtime.model.geometry import image_geometry, padded
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline, Request

pytestmark = pytest.mark.deep

# The chain of block programs is the model


@pytest.mark.parametrize("tokens", [1, 31, 32, 100])
def test_text_encoder_and_caption(make: Make, cpu: Pipeline, tokens: int) -> None:
    _, pipeline = make()
    ids = np.random.default_rng(tokens).integers(0, 320, tokens).tolist()
    expected, found = cpu.hidden_states(session(cpu), tuple(ids)), pipeline.hidden_states(session(pipeline), tuple(ids))
    assert relative_error(found, expected) < TOLERANCE
    geometry = image_geometry(64, 64, cpu.bundle.manifest.config)
    schedule = cpu.prepare(Request("x", size=(64, 64), steps=2)).schedule
    captions = [session(p).denoiser(p.conditioning(geometry, schedule, expected)) for p in (pipeline, cpu)]
    assert relative_error(captions[0].steps.caption, captions[1].fixed["caption"]) < TOLERANCE  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(64, 64), (80, 112), (16, 16), (256, 48)])
def test_denoiser(make: Make, cpu: Pipeline, size: tuple[int, int]) -> None:
    _, pipeline = make()
    geometry = image_geometry(*size, cpu.bundle.manifest.config)
    hidden = np.random.default_rng(1).standard_normal((1, 40, 64), dtype=np.float32)
    schedule = cpu.prepare(Request("x", size=size, steps=2)).schedule
    latents = cpu.initial_latents(geometry, (1,))
    conditioning = cpu.conditioning(geometry, schedule, hidden)
    found, expected = (session(p).denoiser(conditioning)(latents, 1) for p in (pipeline, cpu))
    assert relative_error(found, expected) < TOLERANCE


def test_autoencoder(make: Make, cpu: Pipeline) -> None:
    _, pipeline = make()
    latents = np.random.default_rng(2).standard_normal((2, 16, 6, 10), dtype=np.float32)
    assert relative_error(session(pipeline).decode(latents), session(cpu).decode(latents)) < TOLERANCE
    image = np.tanh(np.random.default_rng(3).standard_normal((2, 3, 32, 48), dtype=np.float32))
    for found, expected in zip(session(pipeline).encode(image), session(cpu).encode(image), strict=True):
        assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("case", [CASE, Case("", (16, 16), 1), Case("一只猫 " * 40, (48, 80), 2)])
def test_the_image_is_the_cpus(make: Make, cpu: Pipeline, case: Case) -> None:
    _, pipeline = make()
    check_parity(draw(pipeline, case)[0], draw(cpu, case)[0])


# Budgets


def test_every_budget_from_the_smallest_on_generates_the_same(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec
) -> None:
    """The device has not a byte more than the budget, and the order of what is queued is another each time."""
    expected = draw(cpu, CASE)[0]
    sizes = sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))
    smallest = least(opened, spec, sizes)
    streamed, peaks = set(), []
    for extra in (0, 450_000, 1_000_000, 60_000_000):
        work = work_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))
        plan = plan_residency(spec, opened.manifest, work, smallest + extra)
        streamed.add(len(plan.stages[Program.DENOISER].streamed))
        device, pipeline = make(smallest + extra, seed=extra)
        check_parity(draw(pipeline, CASE)[0], expected)
        assert CONTEXT_BYTES + device.peak == plan.peak, "the plan is what is allocated, to the byte"
        peaks.append(device.peak)
    assert min(streamed) == 0
    assert max(streamed) == 5, "in the smallest budget, all blocks are streamed"
    assert peaks == sorted(peaks)


def test_a_budget_below_the_smallest_is_refused_before_anything_is_loaded(
    make: Make, opened: Bundle, spec: VariantSpec, cpu: Pipeline
) -> None:
    smallest = least(opened, spec, sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt))))
    device, pipeline = make(smallest - 1)
    with raises_with(MemoryLimitError, "VRAM", "--vram", "--size", "--executor cpu") as refusal:
        pipeline.stream(CASE.prompt, size=CASE.size, steps=CASE.steps, seed=CASE.seed)
    assert not device.uploaded
    given, asked = memory_amounts(str(refusal.value))
    assert given < smallest / 2**30 < asked
    _, pipeline = make(int(asked * 2**30))
    draw(pipeline, CASE)


def test_what_does_not_fit_of_the_autoencoder_runs_on_the_cpu(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec
) -> None:
    smallest = least(opened, spec, sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt))))
    _, pipeline = make(smallest)
    events = list(pipeline.stream(CASE.prompt, size=CASE.size, steps=1, seed=CASE.seed))
    (said,) = [event.text for event in events if isinstance(event, NoticeEvent) and "decoded" in event.text]
    assert_facts(said, "CPU", "tiles", "GPU")
    (enough,) = memory_amounts(said)
    config = opened.manifest.config
    assert plan_stage(Program.DECODER, spec, config, sizes_of(opened, CASE, 1), int(enough * 2**30)) is not None
    assert plan_stage(Program.DECODER, spec, config, sizes_of(opened, CASE, 1), int((enough - 0.01) * 2**30)) is None
    (found,) = draw(pipeline, CASE)
    assert Program.DECODER not in pipeline.executor.loaded  # type: ignore[attr-defined]
    check_parity(found, draw(cpu, CASE)[0])
    image = np.tanh(np.random.default_rng(3).standard_normal((1, 3, 96, 64), dtype=np.float32))
    for one, other in zip(session(pipeline).encode(image), session(cpu).encode(image), strict=True):
        assert relative_error(one, other) < TOLERANCE


def test_sizes_that_the_engines_were_not_built_for(make: Make, spec: VariantSpec, opened: Bundle) -> None:
    _, pipeline = make()
    with raises_with(RequestError, 16896, "--size", "--executor cpu") as refusal:
        pipeline.stream("x", size=(4096, 4096), steps=1, seed=0)
    assert re.search(r"\b20\d\dx20\d\d\b", str(refusal.value)), "the largest size"
    config = opened.manifest.config
    works = [Work(geometry=image_geometry(*size, config), tokens=10) for size in ((4096, 16), (16, 4096))]
    wide, tall = (plan_residency(spec, opened.manifest, work, EVERYTHING) for work in works)
    assert Program.DENOISER in wide.stages
    assert Program.DECODER not in wide.stages
    assert wide.how_decoded is not None
    assert_facts(wide.how_decoded, "CPU", "tiles", "engines")
    assert wide.on_host[Program.DECODER] is None, "at no budget"
    assert tall.in_tiles
    assert tall.how_decoded is not None
    assert_facts(tall.how_decoded, "tiles", "engines")
    assert "CPU" not in tall.how_decoded
    assert memory_amounts(wide.how_decoded + tall.how_decoded) == [], "no budget is enough"


def test_with_room_for_all_nothing_is_uploaded_twice(make: Make) -> None:
    device, pipeline = make()
    first = draw(pipeline, CASE)
    weights = device.uploaded
    assert pipeline.executor.loaded == {  # type: ignore[attr-defined]
        Program.TEXT_ENCODER,
        Program.CAPTION,
        Program.DENOISER,
        Program.DECODER,
    }
    again = draw(pipeline, CASE)
    assert device.uploaded - weights < weights / 4, "the second image uploads activations only"
    np.testing.assert_array_equal(first[0].latents, again[0].latents)


def test_another_prompt_and_size_keep_the_weights(make: Make, cpu: Pipeline) -> None:
    device, pipeline = make()
    draw(pipeline, CASE)
    weights = device.uploaded
    for other in (Case("a considerably longer prompt than the one before " * 2, CASE.size, 2), Case("x", (96, 32), 2)):
        check_parity(draw(pipeline, other)[0], draw(cpu, other)[0])
    assert device.uploaded - weights < weights / 2


# Streaming and graphs


@pytest.mark.parametrize("pinnable", [0, 1_200_000, 1 << 30])
def test_a_batch_is_each_image_and_streams_each_block_once_a_step(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec, pinnable: int
) -> None:
    tokens = len(cpu.token_ids(CASE.prompt))
    device, pipeline = make(least(opened, spec, sizes_of(opened, CASE, tokens, 2)), pinnable=pinnable)
    pair = draw(pipeline, CASE, count=2, batch_size=2)
    for found, expected in zip(pair, draw(cpu, CASE, count=2), strict=True):
        check_parity(found, expected)
    for_two = device.uploaded
    device, pipeline = make(least(opened, spec, sizes_of(opened, CASE, tokens, 2)), pinnable=pinnable)
    draw(pipeline, CASE)
    assert for_two < 1.2 * device.uploaded


def test_a_step_is_captured_once_and_launched_after(make: Make) -> None:
    device, pipeline = make()
    draw(pipeline, Case("x", (32, 32), steps=6))
    assert device.calls.count("begin_capture") == 1
    assert device.calls.count("launch") == 5, "the first step runs queued, the others from the graph"
    draw(pipeline, Case("y", (32, 32), steps=6))
    assert device.calls.count("begin_capture") == 1, "what is captured serves the next image"


def test_nothing_is_captured_while_blocks_are_streamed(
    make: Make, opened: Bundle, spec: VariantSpec, cpu: Pipeline
) -> None:
    sizes = sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))
    device, pipeline = make(least(opened, spec, sizes))
    draw(pipeline, CASE)
    assert "begin_capture" not in device.calls


# The stand-in catches what it is there to catch


def broken(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Callable[..., object]) -> None:
    monkeypatch.setattr(weight_stream.WeightStream, name, replacement)


def test_computing_before_a_block_is_there_is_caught(
    make: Make, opened: Bundle, spec: VariantSpec, cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(self: weight_stream.WeightStream, index: int) -> int:
        if index in self._addresses:
            return self._addresses[index]
        return self._slots[self._used % 2]  # without waiting for `ready`

    broken(monkeypatch, "acquire", acquire)
    _, pipeline = make(least(opened, spec, sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))), clean=False)
    with raises_with(MisuseError, "orders", "read"):
        draw(pipeline, CASE)


def test_overwriting_a_block_that_is_computed_with_is_caught(
    make: Make, opened: Bundle, spec: VariantSpec, cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def queue_next(self: weight_stream.WeightStream) -> None:
        streamed = self.plan.streamed
        slot, index = self._queued % 2, streamed[self._queued % len(streamed)]
        self._upload(slot, index, self._slots[slot])  # without waiting for `done`
        self._queued += 1

    broken(monkeypatch, "_queue_next", queue_next)
    _, pipeline = make(least(opened, spec, sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))), clean=False)
    with raises_with(MisuseError, "orders", "write"):
        draw(pipeline, CASE)


def test_refilling_staging_memory_too_early_is_caught(
    make: Make, opened: Bundle, spec: VariantSpec, cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInDevice, "synchronize_event", lambda self, event: None)
    _, pipeline = make(least(opened, spec, sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))), clean=False)
    with raises_with(MisuseError, "pinned memory", "overwritten"):
        draw(pipeline, CASE)


def test_residents_that_computing_does_not_wait_for_are_caught(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "_order_after_residents", lambda self: None)
    monkeypatch.setattr(weight_stream.WeightStream, "pinnable", 1 << 30)

    def load(self: weight_stream.WeightStream) -> None:
        sizes = self.plan.needs.block_bytes
        self._staging = [self.arena.pinned(max(sizes)) for _ in range(2)]
        self._ready = [self.arena.event() for _ in range(2)]
        for turn, index in enumerate(sorted(self.plan.resident)):
            self._addresses[index] = self.arena.allocate(sizes[index])
            self._upload(turn % 2, index, self._addresses[index])

    broken(monkeypatch, "load", load)
    _, pipeline = make(clean=False)
    with raises_with(MisuseError, "orders", "read"):
        draw(pipeline, CASE)


def test_more_scratch_than_the_catalog_says_is_planned_again(
    make: Make, opened: Bundle, spec: VariantSpec, cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks would be resident, but contexts need so much that some are streamed: known before any is loaded."""
    import onnx_engines

    work = work_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))
    tokens = work.geometry.image_tokens + padded(work.tokens)
    needs = stage_needs(Program.DENOISER, spec, opened.manifest.config, sizes_of(opened, CASE, work.tokens))
    monkeypatch.setattr(onnx_engines, "SCRATCH_PER_POSITION", 200_000)  # two hundred times what the catalog says
    vram = CONTEXT_BYTES + needs.fixed(1) + sum(needs.block_bytes) + 200_000 * tokens - needs.scratch - 300_000
    before = plan_residency(spec, opened.manifest, work, vram)
    assert not before.stages[Program.DENOISER].streamed
    device, pipeline = make(vram)
    check_parity(draw(pipeline, CASE)[0], draw(cpu, CASE)[0])
    after = pipeline.executor.plan(work)
    assert isinstance(after, ResidencyPlan)
    assert after.stages[Program.DENOISER].streamed
    assert after.stages[Program.DENOISER].needs.scratch >= 200_000 * tokens
    assert CONTEXT_BYTES + device.peak <= vram


def test_scratch_that_does_not_fit_is_refused_before_weights_are_loaded(
    make: Make, opened: Bundle, spec: VariantSpec, cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_engines

    smallest = least(opened, spec, sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt))))
    monkeypatch.setattr(onnx_engines, "SCRATCH_PER_POSITION", 200_000)
    device, pipeline = make(smallest)
    with raises_with(MemoryLimitError, "VRAM", "--vram", "--size", "--executor cpu") as refusal:
        draw(pipeline, CASE)
    assert not device.uploaded
    assert not device.used
    given, asked = memory_amounts(str(refusal.value))
    assert given < asked


# Failures


CALLS = ("allocate", "allocate_pinned", "create_event", "upload", "copy", "download", "record", "wait", "synchronize")


@pytest.mark.parametrize(
    ("call", "streams"),
    [
        *((call, streams) for call in CALLS for streams in (False, True)),
        ("launch", False),  # streamed steps are not captured
    ],
)
def test_whatever_fails_the_error_is_its_own_and_nothing_is_left(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec, call: str, streams: bool
) -> None:
    """Fails the first, the second, … call of a kind, until all succeed; then the executor still generates right."""
    case = Case("x", (32, 32), 2)
    vram = least(opened, spec, sizes_of(opened, case, len(cpu.token_ids("x")))) if streams else EVERYTHING
    device, pipeline = make(vram)
    failed = 0
    for turn in (0, 7):
        left = [turn]

        def fail(name: str, left: list[int] = left) -> bool:
            left[0] -= name == call
            return name == call and left[0] == -1

        device.fail = fail
        error = None
        try:
            draw(pipeline, case)
        except ExecutorError as raised:
            error = raised
        device.fail = lambda name: False
        if error is not None:
            assert_facts(str(error), call, "as the test wants it to")
            assert device.used == 0, "what failed gave everything back"
            failed += 1
        pipeline.release()
    assert failed
    device.fail = lambda name: False
    check_parity(draw(pipeline, case)[0], draw(cpu, case)[0])


def test_cancelling_between_steps_leaves_nothing_under_way(make: Make) -> None:
    device, pipeline = make()
    events = pipeline.stream("x", size=(32, 32), steps=4, seed=0)
    next(events)
    next(events)
    events.close()  # type: ignore[attr-defined]
    pipeline.release()
    assert device.used == 0


def test_latents_are_not_views_of_pinned_memory(make: Make) -> None:
    """Pinned memory is freed with the stage; what was returned must outlive it."""
    device, pipeline = make()
    geometry = image_geometry(32, 32, pipeline.bundle.manifest.config)
    hidden: FloatArray = np.ones((1, 8, 64), np.float32)
    conditioning = pipeline.conditioning(
        geometry, pipeline.prepare(Request("x", size=(32, 32), steps=2)).schedule, hidden
    )
    denoiser = session(pipeline).denoiser(conditioning)
    velocity = denoiser(pipeline.initial_latents(geometry, (0,)), 0)
    kept = velocity.copy()
    denoiser(pipeline.initial_latents(geometry, (1,)), 1)
    np.testing.assert_array_equal(velocity, kept)
    assert velocity.base is None or isinstance(velocity.base, np.ndarray)
    assert device.used
