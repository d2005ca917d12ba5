"""Residency plans and streamed blocks over random budgets and layer counts, on the stand-in device."""

import numpy as np
from device_stand_in import Operation, StandInDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zimage_runtime.executors.tensorrt.arena import Arena, Budget
from zimage_runtime.executors.tensorrt.block_catalog import aligned
from zimage_runtime.executors.tensorrt.plan import SLOTS, StagePlan, _least, _plan_stage, spread
from zimage_runtime.executors.tensorrt.stage_sizes import StageNeeds
from zimage_runtime.executors.tensorrt.weight_stream import WeightStream
from zimage_runtime.model.blocks import BlockKind, BlockPlace

BLOCKS = st.lists(st.integers(1, 12).map(lambda units: units * 256), min_size=1, max_size=12)
EVEN_BLOCKS = st.builds(lambda size, count: [size * 256] * count, st.integers(1, 12), st.integers(1, 40))


def needs(blocks: list[int], fixed: int = 0) -> StageNeeds:
    places = tuple(BlockPlace(BlockKind.TEXT_LAYER, f"layers.{index}") for index in range(len(blocks)))
    return StageNeeds(places, tuple(blocks), (), (), {"x": fixed} if fixed else {}, {}, 0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_resident_blocks_are_spread_evenly(count: int, chosen: int) -> None:
    chosen = min(chosen, count)
    found = sorted(spread(count, chosen))
    assert len(found) == chosen
    assert all(0 <= index < count for index in found)
    gaps = np.diff([-1, *found])
    assert chosen == 0 or gaps.max() - gaps.min() <= 1


@given(BLOCKS | EVEN_BLOCKS, st.integers(0, 4000), st.integers(0, 60_000))
def test_a_plan_fits_its_room_and_there_is_one_whenever_there_can_be(blocks: list[int], fixed: int, room: int) -> None:
    need = needs(blocks, fixed)
    plan = _plan_stage(need, room, 1, streamable=True)
    if room >= _least(need, 1):
        assert plan is not None
        assert plan.nbytes <= room
        assert set(plan.resident) | set(plan.streamed) == set(range(len(blocks)))
        assert not plan.resident & set(plan.streamed)
        everything = sum(blocks) + aligned(fixed)
        assert (not plan.streamed) == (everything <= room), "all is resident exactly where all fits"
    else:
        assert plan is None


@given(EVEN_BLOCKS, st.integers(0, 100_000), st.integers(0, 20_000))
def test_more_room_never_keeps_fewer_blocks_and_none_is_left_unused(blocks: list[int], room: int, more: int) -> None:
    need = needs(blocks)
    plan, other = (_plan_stage(need, size, 1, streamable=True) for size in (room, room + more))
    if plan is None or other is None:
        return
    assert len(other.resident) >= len(plan.resident)
    if plan.streamed:
        one_more = StagePlan(need, spread(len(blocks), len(plan.resident) + 1), 1)
        assert one_more.nbytes > room or len(plan.resident) + 1 + SLOTS > len(blocks)


@given(BLOCKS, st.integers(0, 1 << 30))
def test_what_cannot_be_streamed_is_whole_or_not_at_all(blocks: list[int], room: int) -> None:
    plan = _plan_stage(needs(blocks), room, 1, streamable=False)
    assert (plan is None) == (sum(blocks) > room)
    assert plan is None or not plan.streamed


@settings(max_examples=120, deadline=None)
@given(
    BLOCKS | EVEN_BLOCKS.filter(lambda blocks: len(blocks) <= 20),
    st.floats(0, 1),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_every_pass_computes_with_every_blocks_own_weights(
    blocks: list[int], share: float, passes: int, wraps: bool, pins: bool, seed: int
) -> None:
    """In budgets from the least on, for stages that repeat and that do not, in random orders of execution."""
    need = needs(blocks)
    least, most = _least(need, 1), max(sum(blocks), _least(need, 1))
    room = int(least + share * (most - least))
    plan = _plan_stage(need, room, 1, streamable=True)
    assert plan is not None
    device = StandInDevice(limit=room, seed=seed)
    budget = Budget(room)
    arena = Arena(device, budget)
    compute, copies = device.create_stream(), device.create_stream()
    reads = [0] * len(blocks)

    def fill(index: int, target: NDArray[np.uint8]) -> None:
        assert len(target) == blocks[index]
        target[:] = pattern(index, blocks[index])
        reads[index] += 1

    stream = WeightStream(device, arena, plan, fill, compute, copies, wraps=wraps, pinnable=pins * (1 << 30))
    stream.load()
    seen: list[int] = []
    for _ in range(passes):
        stream.begin()
        for index, size in enumerate(blocks):
            address = stream.acquire(index)

            def check(index: int = index, address: int = address, size: int = size) -> None:
                np.testing.assert_array_equal(device.view(address, size), pattern(index, size))
                seen.append(index)

            device.enqueue(Operation(f"block {index}", [(address, size)], [], check), compute)
            stream.release(index)
    device.synchronize(copies)
    device.synchronize(compute)
    assert seen == list(range(len(blocks))) * passes
    for index in plan.resident:
        assert reads[index] == 1
    for index in plan.streamed:
        assert (reads[index] == 1) if pins else (passes <= reads[index] <= passes + 1)
        assert wraps or pins or reads[index] == passes, "nothing is read that no pass needs"
    assert budget.peak == device.peak <= room
    arena.release()
    device.destroy_stream(compute)
    device.destroy_stream(copies)
    device.assert_clean()


def pattern(index: int, size: int) -> NDArray[np.uint8]:
    """Bytes that no two blocks share."""
    return np.random.default_rng(index).integers(0, 256, size, dtype=np.uint8)
