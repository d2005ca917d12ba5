"""What a real device refuses, on the stand-in: captures, memory, pinned memory; and a GPU that is lost."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from executor_tools import CASE, EVERYTHING, Make, least, sizes_of, work_of
from facts import assert_facts, memory_amounts, raises_with
from onnx_engines import OnnxEngines
from parity import Case, check_parity, draw
from sessions import session

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import DeviceLostError, ExecutorError
from zimage_runtime.events import ImageEvent, StepEvent
from zimage_runtime.executors.tensorrt import stage_sizes, weight_stream
from zimage_runtime.executors.tensorrt.block_catalog import VariantSpec
from zimage_runtime.executors.tensorrt.device import OutOfDeviceMemoryError, Pinned, PinnedMemoryError
from zimage_runtime.executors.tensorrt.executor import TensorRtExecutor
from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES, plan_residency
from zimage_runtime.executors.tensorrt.stage_sizes import stage_needs
from zimage_runtime.executors.tensorrt.weight_source import WeightSource
from zimage_runtime.model.blocks import BlockPlace
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline

SMALL = Case("x", (32, 32), 4)


def executor_of(pipeline: Pipeline) -> TensorRtExecutor:
    assert isinstance(pipeline.executor, TensorRtExecutor)
    return pipeline.executor


def engines_of(pipeline: Pipeline) -> OnnxEngines:
    engines = executor_of(pipeline).engines
    assert isinstance(engines, OnnxEngines)
    return engines


# Capture


@pytest.mark.parametrize("call", ["begin_capture", "upload", "end_capture"])
def test_a_capture_that_fails_is_gone_without(make: Make, cpu: Pipeline, call: str) -> None:
    """Once, with a note; the image is right, and the next one does not try again."""
    notes: list[str] = []
    device, pipeline = make(note=notes.append)
    device.fail = lambda name: name == call and (call != "upload" or "begin_capture" in device.calls[-2:])
    check_parity(draw(pipeline, SMALL)[0], draw(cpu, SMALL)[0])
    assert device.calls.count("begin_capture") == 1
    assert "launch" not in device.calls
    (note,) = notes
    assert_facts(note, "CUDA graph", call)
    draw(pipeline, SMALL)
    assert device.calls.count("begin_capture") == 1
    assert len(notes) == 1


def test_engines_that_cannot_be_captured_are_not(make: Make, cpu: Pipeline) -> None:
    notes: list[str] = []
    device, pipeline = make(note=notes.append)
    engines_of(pipeline).capturable = False
    check_parity(draw(pipeline, SMALL)[0], draw(cpu, SMALL)[0])
    assert "begin_capture" not in device.calls
    (note,) = notes
    assert_facts(note, "CUDA graph", "TensorRT")


# Memory


def test_a_device_with_less_memory_than_was_free_is_planned_for_again(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec
) -> None:
    work = work_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))
    peak = plan_residency(spec, opened.manifest, work, EVERYTHING).peak
    notes: list[str] = []
    device, pipeline = make(note=notes.append)
    device.room = int((peak - CONTEXT_BYTES) * 0.8)  # not all stages together
    check_parity(draw(pipeline, CASE)[0], draw(cpu, CASE)[0])
    (note,) = notes
    (amount,) = memory_amounts(note)
    assert amount == pytest.approx(0.9 * EVERYTHING / 2**30, abs=0.01)
    assert executor_of(pipeline).plan(work).budget == int(0.9 * EVERYTHING)


def test_a_device_that_has_no_memory_left_says_so_and_keeps_none(make: Make, cpu: Pipeline) -> None:
    device, pipeline = make()
    device.room = 100_000
    with raises_with(OutOfDeviceMemoryError, "bytes"):
        draw(pipeline, SMALL)
    assert device.used == 0
    device.room = 1 << 40
    check_parity(draw(pipeline, SMALL)[0], draw(cpu, SMALL)[0])


@pytest.mark.parametrize("streams", [False, True])
def test_weights_pass_two_small_buffers_where_no_whole_block_can_be_pinned(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    sizes = sizes_of(opened, SMALL, len(cpu.token_ids(SMALL.prompt)))
    vram = least(opened, spec, sizes) if streams else EVERYTHING
    monkeypatch.setattr(weight_stream, "PIECE", 20_000)
    device, pipeline = make(vram, pinnable=EVERYTHING)
    device.most_pinned = 100_000  # blocks are larger
    check_parity(draw(pipeline, SMALL)[0], draw(cpu, SMALL)[0])


def test_blocks_that_cannot_stay_pinned_are_read_again(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The staging buffers could be pinned; after a few blocks, no more can."""
    sizes = sizes_of(opened, SMALL, len(cpu.token_ids(SMALL.prompt)))
    device, pipeline = make(least(opened, spec, sizes), pinnable=EVERYTHING)
    large, allocate_pinned = [0], device.allocate_pinned

    def limited(nbytes: int) -> Pinned:
        large[0] += nbytes > 200_000 and Program.DENOISER in executor_of(pipeline).loaded
        if nbytes > 200_000 and large[0] > 4:
            raise PinnedMemoryError("no more is pinned")
        return allocate_pinned(nbytes)

    monkeypatch.setattr(device, "allocate_pinned", limited)
    check_parity(draw(pipeline, SMALL)[0], draw(cpu, SMALL)[0])
    assert large == [5], "two for staging, two that stay, and none after the first that could not"


def test_as_many_blocks_stay_pinned_as_may(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are read once, the others in each of four steps."""
    sizes = sizes_of(opened, SMALL, len(cpu.token_ids(SMALL.prompt)))
    needs = stage_needs(Program.DENOISER, spec, opened.manifest.config, sizes)
    assert len(set(needs.block_bytes)) == 1
    _, pipeline = make(least(opened, spec, sizes), pinnable=2 * needs.block_bytes[0])
    filled: Counter[str] = Counter()
    fill = WeightSource.fill

    def count(self: WeightSource, target: Any, place: BlockPlace, *rest: Any) -> None:
        filled[place.key] += place in needs.blocks
        fill(self, target, place, *rest)

    monkeypatch.setattr(WeightSource, "fill", count)
    check_parity(draw(pipeline, SMALL)[0], draw(cpu, SMALL)[0])
    times = [filled[place.key] for place in needs.blocks]
    assert times[:2] == [1, 1]
    assert min(times[2:]) >= 4


# A lost GPU


@pytest.mark.parametrize("call", ["launch", "synchronize"])
def test_nothing_of_a_lost_device_is_touched_again(make: Make, call: str) -> None:
    device, pipeline = make(clean=False)
    events = pipeline.stream("x", size=(32, 32), steps=4, seed=0)
    for event in events:
        if isinstance(event, StepEvent):
            break
    device.fail, device.error = lambda name: name == call, DeviceLostError
    with raises_with(DeviceLostError, call):
        list(events)
    last = len(device.calls) - device.calls[::-1].index(call)
    with raises_with(DeviceLostError, call):
        draw(pipeline, SMALL)
    pipeline.release()
    pipeline.close()
    assert device.calls[last:] == [], "freeing may wait for the device without end"


def test_a_kernel_that_fails_because_the_device_was_lost_says_that(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT reports that it could not run; what happened, the device's next answer says."""
    device, pipeline = make(clean=False)
    draw(pipeline, SMALL)

    def fails(*arguments: object) -> None:
        device.fail, device.error = lambda name: True, DeviceLostError
        raise ExecutorError("an engine failed to run")

    monkeypatch.setattr(device, "launch", fails)
    with raises_with(DeviceLostError, "synchronize"):
        draw(pipeline, SMALL)
    device.fail = lambda name: False


# Work that is shaped for the device


def test_prompts_of_similar_length_share_the_text_encoders_shapes(make: Make, cpu: Pipeline) -> None:
    """Kernels are compiled for each shape. What is appended changes nothing, as attention is causal."""
    _, pipeline = make()
    for tokens in (1, 5, 63, 64, 65):
        ids = tuple(np.random.default_rng(tokens).integers(0, 320, tokens).tolist())
        found, expected = (one.hidden_states(session(one), ids) for one in (pipeline, cpu))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    shapes = {shape[1] for program, shape in engines_of(pipeline).shapes if program == "text_layer"}
    assert shapes == {64, 128}


def test_attention_in_bands_is_the_whole_attention(make: Make, cpu: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 130 positions, at most 64 at a time: two bands and a rest."""
    monkeypatch.setattr(stage_sizes, "BAND_POSITIONS", 64)
    _, pipeline = make()
    latents = np.random.default_rng(2).standard_normal((1, 16, 10, 13), dtype=np.float32)
    found, expected = (session(one).decode(latents) for one in (pipeline, cpu))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    image = np.tanh(np.random.default_rng(3).standard_normal((1, 3, 80, 104), dtype=np.float32))
    for one, other in zip(session(pipeline).encode(image), session(cpu).encode(image), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    shapes = [shape for program, shape in engines_of(pipeline).shapes if re.fullmatch("middle_attention", program)]
    assert shapes, "the map comes first"


def test_images_are_denoised_before_the_first_is_decoded_where_stages_take_turns(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec
) -> None:
    """So each stage is loaded once for all of them."""
    _, pipeline = make(least(opened, spec, sizes_of(opened, SMALL, len(cpu.token_ids("x")))))
    events = pipeline.stream("x", size=(32, 32), steps=1, seed=0, count=3)
    kinds = [type(event) for event in events if isinstance(event, StepEvent | ImageEvent)]
    assert kinds == [StepEvent] * 3 + [ImageEvent] * 3
