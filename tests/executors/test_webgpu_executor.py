"""The `webgpu` executor on an adapter: the images of the `cpu` executor, whatever a request asks for.

A software adapter will do, and is what CI has: see `webgpu_adapter`.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_with
from parity import Case, check_parity, draw
from PIL import Image
from stale_attention import stale_attention
from webgpu_adapter import require_adapter

from zimage_rt import demo_bundle
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import WEBGPU, Precision
from zimage_runtime.errors import CancelledError, MemoryLimitError
from zimage_runtime.events import ImageEvent, NoticeEvent, StepEvent
from zimage_runtime.executors.ort import webgpu_library
from zimage_runtime.executors.ort.attention_verdict import attend_on_webgpu, attention, judge
from zimage_runtime.executors.ort.device_executor import OrtDeviceExecutor
from zimage_runtime.executors.ort.device_plan import VramPlan
from zimage_runtime.executors.ort.webgpu import webgpu_executor
from zimage_runtime.executors.ort.webgpu_adapters import find_adapter
from zimage_runtime.executors.ort.webgpu_answers import relative_error
from zimage_runtime.executors.overheads import ORT_WEBGPU
from zimage_runtime.executors.protocol import UNLIMITED
from zimage_runtime.executors.worker import Stop
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline, Request

pytestmark = pytest.mark.deep

SIZE = (64, 48)
STEPS = 2


@pytest.fixture(autouse=True, scope="module")
def adapter() -> None:
    require_adapter()


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


@pytest.fixture
def pipeline(opened: Bundle) -> Iterator[Pipeline]:
    with on_adapter(opened) as made:
        yield made
    assert not webgpu_library.HOLDINGS.any, "a session outlives its executor"


@pytest.fixture(scope="module")
def cpu(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle, "cpu") as made:
        yield made


def on_adapter(bundle: Bundle, budget: int = UNLIMITED) -> Pipeline:
    return Pipeline.on(bundle, webgpu_executor(bundle, find_adapter(), budget=budget))


def executor_of(pipeline: Pipeline) -> OrtDeviceExecutor:
    executor = pipeline.executor
    assert isinstance(executor, OrtDeviceExecutor)
    return executor


def image_of(pipeline: Pipeline, request: Request) -> Any:
    *_, event = pipeline.run(pipeline.prepare(request))
    assert isinstance(event, ImageEvent)
    return np.asarray(event.image, np.int16)


def test_the_demo_image_is_the_cpus() -> None:
    """In fp16, from the bundle that ships: the text encoder, eight steps and the decoder."""
    case: dict[str, Any] = {"size": (128, 128), "steps": 8, "seed": 12}
    images = []
    for executor in (WEBGPU, "cpu"):
        with Pipeline.from_bundle(demo_bundle(), executor) as pipeline:
            result = pipeline.generate("a red circle left of a blue square", **case)
            images.append(np.asarray(result.images[0], np.int16))
            assert result.infos[0].executor == executor
    assert np.ptp(images[0]) > 0
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8, Precision.INT4])
def test_narrow_weights_generate(precision: Precision, bundle_in: Callable[[Precision], Path]) -> None:
    """Not quite as on the CPU, which quantizes activations of integer weights, too."""
    case = Case("a red fox", SIZE, STEPS, 7)
    path = bundle_in(precision)
    with Pipeline.from_bundle(path, WEBGPU) as ours, Pipeline.from_bundle(path, "cpu") as reference:
        (found,), (expected,) = draw(ours, case), draw(reference, case)
    assert np.linalg.norm(found.latents - expected.latents) < 0.1 * np.linalg.norm(expected.latents)


def test_two_sizes_in_turn_and_a_batch(pipeline: Pipeline, cpu: Pipeline) -> None:
    """Neither size is square; what one leaves in the device's buffers does not reach the other."""
    wide, tall = Case("a red fox", SIZE, STEPS, 7), Case("雪地里的一只红狐狸", (32, 80), STEPS, 2**32 - 2)
    for case in (wide, tall, wide):
        check_parity(draw(pipeline, case)[0], draw(cpu, case)[0])
    for found, expected in zip(draw(pipeline, wide, 3, batch_size=2), draw(cpu, wide, 3), strict=True):
        check_parity(found, expected)


def test_a_source_image_and_a_mask(pipeline: Pipeline, cpu: Pipeline) -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8))
    mask = Image.fromarray(np.where(np.arange(64) < 40, 255, 0).astype(np.uint8)[None].repeat(48, 0))
    for given in (None, mask):
        request = Request("a fox", steps=3, seed=3, image=image, mask=given, strength=0.7)
        assert np.abs(image_of(pipeline, request) - image_of(cpu, request)).max() <= 1


def test_guidance_and_another_sampler(pipeline: Pipeline, cpu: Pipeline) -> None:
    """Two conditionings of different lengths stay beside each other."""
    request = Request("a fox", size=SIZE, steps=3, seed=3, negative="a hen, blurry", cfg_scale=3.0, sampler="heun")
    assert np.abs(image_of(pipeline, request) - image_of(cpu, request)).max() <= 1
    plain = Request("a fox", size=SIZE, steps=3, seed=3, sampler="heun")
    assert np.abs(image_of(pipeline, request) - image_of(pipeline, plain)).max() > 1


def roomy_plan(bundle: Bundle, request: Request) -> VramPlan:
    with on_adapter(bundle) as roomy:
        plan = roomy.prepare(request).plan
    assert isinstance(plan, VramPlan)
    assert plan.keep_all
    return plan


def test_stages_take_turns_and_free_the_device(opened: Bundle, cpu: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are freed with the device alone: before a stage is loaded, there is no session."""
    before: list[bool] = []
    open_session = webgpu_library.open_session

    def watched(*arguments: Any, **options: Any) -> Any:
        before.append(webgpu_library.HOLDINGS.any)
        return open_session(*arguments, **options)

    monkeypatch.setattr("zimage_runtime.executors.ort.webgpu.open_session", watched)
    case = Case("a red fox", SIZE, STEPS, 7)
    plan = roomy_plan(opened, Request(case.prompt, size=case.size, steps=case.steps))
    with on_adapter(opened, plan.peak - 1) as tight:
        check_parity(draw(tight, case)[0], draw(cpu, case)[0])
        assert not executor_of(tight).loaded - {Program.MODULATION}
    assert before == [False] * 4
    before.clear()
    with on_adapter(opened) as roomy:
        draw(roomy, case)
        draw(roomy, replace(case, prompt="another"))
        assert before == [False, True, True, True], "what fits stays loaded"


def test_what_does_not_fit_is_encoded_and_decoded_in_tiles(opened: Bundle, cpu: Pipeline) -> None:
    size = (384, 256)  # below it, buffers of the denoiser are the largest, and tiles would not help
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8))
    request = Request("a fox", steps=2, seed=0, image=image, strength=0.5)
    stages = roomy_plan(opened, request).stages
    budget = ORT_WEBGPU.nbytes + min(stages[Program.DECODER].total, stages[Program.ENCODER].total) - 1
    with on_adapter(opened, budget) as tight:
        events = list(tight.run(tight.prepare(request)))
    assert isinstance(events[0], NoticeEvent)
    assert "encoded and decoded in tiles" in events[0].text
    assert isinstance(events[-1], ImageEvent)
    assert np.abs(np.asarray(events[-1].image, np.int16) - image_of(cpu, request)).max() <= 1


def test_released_and_opened_again(pipeline: Pipeline) -> None:
    case = Case("a red fox", SIZE, STEPS, 7)
    (first,) = draw(pipeline, case)
    assert webgpu_library.HOLDINGS.any
    pipeline.release()
    assert not webgpu_library.HOLDINGS.any
    assert webgpu_library.HOLDINGS.stale == 0
    (second,) = draw(pipeline, case)
    np.testing.assert_array_equal(first.latents, second.latents)


def test_cancelled_between_two_operators(pipeline: Pipeline) -> None:
    """By another thread, while a step runs; what is loaded then generates as before."""
    case = Case("a red fox", SIZE, STEPS, 7)
    (expected,) = draw(pipeline, case)
    executor, program = executor_of(pipeline), Program.DENOISER
    running, run = threading.Event(), executor._run
    stops: list[Stop] = []

    def noted(ran: Program, binding: Any, stop: Stop, shrink: bool) -> None:
        if ran is program:
            stops.append(stop)
            running.set()
        run(ran, binding, stop, shrink)

    executor._run = noted  # type: ignore[method-assign]

    def cancel() -> None:
        assert running.wait(60)
        pipeline.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    events: list[object] = []
    with pytest.raises(CancelledError):
        events.extend(pipeline.stream("a red fox", size=(256, 256), steps=50, seed=1))
    thread.join()
    assert stops[0].requested
    assert sum(isinstance(event, StepEvent) for event in events) < 50
    executor._run = run  # type: ignore[method-assign]
    np.testing.assert_array_equal(draw(pipeline, case)[0].latents, expected.latents)


def test_pipelines_of_one_process_share_the_device(opened: Bundle, cpu: Pipeline) -> None:
    """In threads of their own, where the library itself would end the process."""
    cases = [Case("a red fox", SIZE, STEPS, 7), Case("a blue bird", (32, 80), STEPS, 8)]
    expected = [draw(cpu, case)[0] for case in cases]
    found: dict[int, Any] = {}
    with on_adapter(opened) as one, on_adapter(opened) as other:

        def work(number: int, pipeline: Pipeline) -> None:
            for _ in range(2):
                found[number] = draw(pipeline, cases[number])[0]

        threads = [threading.Thread(target=work, args=(n, p)) for n, p in enumerate((one, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.release()
        assert webgpu_library.HOLDINGS.stale > 0, "freed weights stay with the other's device"
    for number, drawing in enumerate(expected):
        check_parity(found[number], drawing)
    assert webgpu_library.HOLDINGS.stale == 0


def test_stages_cannot_take_turns_beside_another_pipeline(opened: Bundle) -> None:
    """The memory of one stage would not be freed for the next."""
    request = Request("a fox", size=SIZE, steps=1, seed=1)
    tight = roomy_plan(opened, request).peak - 1
    with on_adapter(opened) as other, on_adapter(opened, tight) as pipeline:
        assert pipeline.prepare(request).plan.group > 1
        draw(other, Case("a fox", SIZE, 1))
        with raises_with(MemoryLimitError, "release", "turns"):
            pipeline.prepare(request)
        other.release()
        pipeline.prepare(request)


@pytest.mark.slow  # a software adapter compiles the fused kernel for minutes
def test_what_the_adapter_says_of_the_fused_kernel() -> None:
    """Right, or wrong as Vulkan is: by scores that are added to those of the tile before. Anything else is new."""
    verdict = judge(attend_on_webgpu, 64)
    print(f"on {find_adapter()}: {verdict.text}")
    if verdict.right:
        return
    random = np.random.default_rng(1)
    queries, keys, values = (random.standard_normal((1, 64, 128), dtype=np.float32) for _ in range(3))
    found = attend_on_webgpu(queries, keys, values, 2)
    to_true = relative_error(found, attention(queries, keys, values, 2))
    to_stale = relative_error(found, stale_attention(queries, keys, values, 2))
    assert to_stale < 1e-5 < 0.01 < to_true
