"""The decoder in tiles on the stand-in device, where its maps do not fit: the image of the `cpu` executor."""

from dataclasses import replace

import numpy as np
import pytest
from executor_tools import CASE, EVERYTHING, TOLERANCE, Make, least, sizes_of, work_of
from facts import assert_facts, memory_amounts, raises_with
from parity import Case, check_parity, draw, relative_error
from sessions import session

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import TensorFile
from zimage_runtime.errors import MemoryLimitError
from zimage_runtime.events import NoticeEvent
from zimage_runtime.executors.ort import cpu_plan as memory
from zimage_runtime.executors.protocol import Work
from zimage_runtime.executors.tensorrt import decoder_tiles as tiles
from zimage_runtime.executors.tensorrt import tile_kernels as device_tiles
from zimage_runtime.executors.tensorrt.block_catalog import VariantSpec
from zimage_runtime.executors.tensorrt.loaded_stage import LoadedStage
from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES, StagePlan, plan_residency, plan_stage
from zimage_runtime.executors.tensorrt.stage_sizes import ImageSizes
from zimage_runtime.model.blocks import BlockPlace, block_tiles, decoder_blocks
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline
from zimage_runtime.tiles.tiling import TiledDecoder

pytestmark = pytest.mark.deep


@pytest.mark.parametrize("values", [1 << 11, 1 << 13])
def test_a_decoder_that_does_not_fit_works_in_tiles(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    """From nothing of it on whole maps to all but the last block, in a device that has just what the plan says."""
    for module in (tiles, device_tiles):
        monkeypatch.setattr(module, "TILE_VALUES", values)
    config = opened.manifest.config
    sizes = ImageSizes(1, 1, 32, latent_height=14, latent_width=10)
    latents = np.random.default_rng(4).standard_normal((2, 16, 14, 10), dtype=np.float32)
    expected = session(cpu).decode(latents)
    work = Work(geometry=image_geometry(80, 112, config), tokens=1)
    generous = plan_residency(spec, opened.manifest, work, EVERYTHING)
    budgets = {
        CONTEXT_BYTES + StagePlan(needs, frozenset(range(len(needs.blocks))), 1).nbytes
        for whole in range(len(decoder_blocks(config)))
        if (needs := tiles.tiled_decoder(spec, config, sizes, whole))
    }
    seen = set()
    for budget in sorted(budgets):
        plan = plan_stage(Program.DECODER, spec, config, sizes, budget)
        assert plan is not None
        if not plan.needs.tiles:
            break
        whole = len(plan.needs.blocks)
        assert whole >= max(seen, default=0), "a larger budget does more on whole maps"
        seen.add(whole)
        device, pipeline = make(budget, seed=budget)
        executor = pipeline.executor
        with executor.session(replace(generous, keep_all=False)) as opened_session:
            found = opened_session.decode(latents)
        assert relative_error(found, expected) < TOLERANCE
        assert device.peak == plan.nbytes
    assert min(seen) == 0
    assert len(seen) > 3


def test_it_is_said_that_an_image_is_decoded_in_tiles(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tiles, device_tiles):
        monkeypatch.setattr(module, "TILE_VALUES", 1 << 11)
    case = Case("a red fox", (128, 128), 1, 3)
    work = work_of(opened, case, len(cpu.token_ids(case.prompt)))
    smallest = least(opened, spec, sizes_of(opened, case, work.tokens))
    plan = plan_residency(spec, opened.manifest, work, smallest)
    assert plan.in_tiles
    assert not plan.keep_all
    device, pipeline = make(smallest)
    (said,) = [
        e.text
        for e in pipeline.stream(case.prompt, size=case.size, steps=1, seed=case.seed)
        if isinstance(e, NoticeEvent) and "decoded" in e.text
    ]
    assert_facts(said, "tiles")
    (asked,) = memory_amounts(said)
    layers: list[str] = []
    send_block = LoadedStage.send_block

    def spy(self: LoadedStage, place: BlockPlace, name: str) -> None:
        layers.append(place.name)
        send_block(self, place, name)

    monkeypatch.setattr(LoadedStage, "send_block", spy)
    check_parity(draw(pipeline, case)[0], draw(cpu, case)[0])
    assert layers == [tile.place.name for tile in plan.stages[Program.DECODER].needs.tiles]
    assert CONTEXT_BYTES + device.peak == plan.peak
    enough = plan_residency(spec, opened.manifest, work, int(asked * 2**30))
    assert enough.how_decoded is None


def test_tiles_need_memory_on_the_host(
    make: Make, opened: Bundle, spec: VariantSpec, cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pipeline = make(least(opened, spec, sizes_of(opened, CASE, len(cpu.token_ids(CASE.prompt)))))
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    with raises_with(MemoryLimitError, "64x96", "GPU", "tiles", "GiB"):
        pipeline.stream(CASE.prompt, size=CASE.size, steps=1, seed=CASE.seed)
    _, pipeline = make()
    pipeline.stream(CASE.prompt, size=CASE.size, steps=1, seed=CASE.seed)


def test_the_decoders_steps_are_its_blocks(opened: Bundle) -> None:
    config = opened.manifest.config
    weights = TensorFile(opened.file(opened.manifest.weights["vae"]))
    assert len(TiledDecoder(config.vae, weights).steps()) == len(decoder_blocks(config))
    names = {f"{tile.name}.weight" for place in decoder_blocks(config) for tile in block_tiles(place)}
    assert names == {n for n, e in weights.entries.items() if n.startswith("decoder.") and e.shape[2:] == (3, 3)}
