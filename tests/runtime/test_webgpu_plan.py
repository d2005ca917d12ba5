"""What an image takes of a GPU's memory with WebGPU: planned before anything is loaded, no less than was measured."""

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from facts import assert_facts, has_fact, raises_with
from test_house import REPOSITORY

from zimage_export.graphs import build_programs
from zimage_export.storage.precision import StoragePolicy
from zimage_export.synthetic.checkpoint import FULL
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import (
    WEBGPU,
    WEBGPU_FUSED,
    Defaults,
    Manifest,
    Origin,
    Precision,
    ProgramRecord,
)
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.errors import MemoryLimitError
from zimage_runtime.executors.ort.device_plan import VramPlan
from zimage_runtime.executors.ort.webgpu_adapters import Adapter
from zimage_runtime.executors.ort.webgpu_plan import WebGpuCosts, largest_buffer, plan_webgpu
from zimage_runtime.executors.overheads import ORT_WEBGPU
from zimage_runtime.executors.protocol import UNLIMITED, Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program
from zimage_runtime.model.query_blocks import MOST_SCORES, denoiser_scores

GIB = 1 << 30
FUSED = WebGpuCosts((WEBGPU_FUSED,))
MEASURED = json.loads((REPOSITORY / "benchmarks" / "results" / "webgpu_block.json").read_text("utf-8"))


@cache
def published(precision: Precision) -> Manifest:
    """A manifest of the published model, sized by the graphs themselves."""
    policy = StoragePolicy(precision, DType.BF16)
    programs: dict[Program, dict[str, ProgramRecord]] = {program: {} for program in MODEL_PROGRAMS}
    for graph in build_programs(FULL.config, policy, {}):
        if graph.executor in (WEBGPU, WEBGPU_FUSED):
            size = sum(graph.types[name].size * math.prod(shape) for name, shape in graph.weights.items())
            programs[graph.program][graph.executor] = ProgramRecord("x", size)
    return Manifest(
        precision=precision,
        source=Origin("full"),
        exporter="test",
        config=FULL.config,
        defaults=Defaults(1024, 1024, 8),
        programs=programs,
        weights={},
        embeddings="",
        tokenizer="",
        files={},
    )


def work(width: int, height: int, **changes: Any) -> Work:
    return Work(geometry=image_geometry(width, height, FULL.config), **{"tokens": 64, **changes})


def plan(precision: Precision, asked: Work, budget: int = UNLIMITED, costs: WebGpuCosts = WebGpuCosts()) -> VramPlan:  # noqa: B008
    return plan_webgpu(published(precision), asked, budget, costs)


def test_weights_are_those_that_the_programs_on_the_gpu_use() -> None:
    stages = plan(Precision.FP16, work(512, 512, encodes=True)).stages
    assert set(stages) == set(MODEL_PROGRAMS) - {Program.MODULATION}
    for program, stage in stages.items():
        assert stage.weights == published(Precision.FP16).programs[program][WEBGPU].weight_bytes > 0
    assert 10.5 < stages[Program.DENOISER].weights / GIB < 11.5, "16 bits for each of 6 billion weights"


def test_what_fits_where() -> None:
    """Sums that anyone can check: 11 GiB of fp16 weights do not fit on a card of 8, 3.5 of int4 do."""
    with pytest.raises(MemoryLimitError):
        plan(Precision.FP16, work(1024, 1024), 8 * GIB)
    assert not plan(Precision.FP16, work(1024, 1024), 16 * GIB).keep_all
    assert plan(Precision.FP16, work(1024, 1024), 40 * GIB).keep_all
    small = plan(Precision.INT4, work(1024, 1024), 8 * GIB)
    assert not small.keep_all
    assert small.peak <= 8 * GIB


@pytest.mark.parametrize("costs", [WebGpuCosts(), FUSED])
def test_no_plan_goes_over_its_budget(costs: WebGpuCosts) -> None:
    """Of many budgets and sizes, every plan that is made fits, and every refusal names a size that does."""
    refused = made = 0
    for width, height, batch in ((512, 512, 1), (1024, 1024, 1), (1536, 1024, 1), (256, 256, 4)):
        for gigabytes in (1, 4, 5, 6, 7, 8, 10, 12, 16, 24):
            asked = work(width, height, batch=batch, encodes=gigabytes % 2 == 0)
            try:
                found = plan(Precision.INT4, asked, gigabytes * GIB, costs)
            except MemoryLimitError as refusal:
                refused, text = refused + 1, str(refusal)
                assert_facts(text, f"{width}x{height}", "--vram")
                size = re.search(r"fits is (\d+)x(\d+)", text)
                assert has_fact(text, "--size") == bool(size)
                if size:
                    smaller = replace(asked, geometry=image_geometry(int(size[1]), int(size[2]), FULL.config))
                    assert plan(Precision.INT4, smaller, gigabytes * GIB, costs).peak <= gigabytes * GIB
                    assert smaller.geometry.width < width
            else:
                made += 1
                assert found.peak <= gigabytes * GIB
    assert refused > 2
    assert made > 10


def test_scores_that_would_be_too_large_are_refused_with_the_largest_size() -> None:
    """However much memory there is. The size that is named is the largest: the next one is refused, too."""
    with raises_with(MemoryLimitError, "2048x2048", "--size", "--executor cpu") as caught:
        plan(Precision.FP16, work(2048, 2048))
    size = re.search(r"fits is (\d+)x(\d+)", str(caught.value))
    assert size
    side = int(size[1])
    assert size[1] == size[2]
    assert side >= 1536
    for tried, fits in ((side, True), (side + 16, False)):
        scores = denoiser_scores(image_geometry(tried, tried, FULL.config), 64, 1, FULL.config)
        assert (scores <= MOST_SCORES) == fits
    plan(Precision.FP16, work(side, side))
    with pytest.raises(MemoryLimitError):
        plan(Precision.FP16, work(side + 16, side + 16))
    with raises_with(MemoryLimitError, "1536x1536", "batches of 2"):
        plan(Precision.FP16, work(1536, 1536, batch=2))


def test_fused_attention_stores_no_scores() -> None:
    assert plan(Precision.FP16, work(2048, 2048), costs=FUSED).denoiser == WEBGPU_FUSED
    asked = work(1536, 1536)
    stored, fused = (plan(Precision.FP16, asked, costs=costs).stages for costs in (WebGpuCosts(), FUSED))
    scores = denoiser_scores(asked.geometry, asked.tokens, 1, FULL.config)
    assert stored[Program.DENOISER].activations >= fused[Program.DENOISER].activations + 2 * scores


def test_maps_that_a_kernel_cannot_bind_are_computed_in_tiles() -> None:
    """The decoder's largest at 1024x1024 is 1 GiB; an adapter that binds 128 MiB at a time takes four at most."""
    small, large = Adapter("a", "Vulkan", binding=GIB // 8), Adapter("b", "Vulkan", binding=4 * GIB, buffer=GIB)
    assert (largest_buffer(small), largest_buffer(large)) == (GIB // 2, GIB)
    for adapter, tiled in ((small, True), (large, False)):
        costs = WebGpuCosts(largest_map=largest_buffer(adapter))
        found = plan(Precision.FP16, work(1024, 1024, encodes=True), costs=costs)
        assert found.tiled == tiled
        assert not found.encodes_tiled, "its maps are half as wide"
        assert (found.host > 0) == tiled
    assert plan(Precision.FP16, work(2048, 2048), costs=FUSED).tiled, "its attention would store too many scores"


def test_every_part_of_a_request_counts() -> None:
    base = plan(Precision.INT8, work(512, 512)).stages
    larger = plan(Precision.INT8, work(1024, 512)).stages
    for program in (Program.DENOISER, Program.DECODER):
        assert larger[program].activations > base[program].activations
    longer = plan(Precision.INT8, work(512, 512, tokens=500)).stages
    for program in (Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER):
        assert longer[program].activations > base[program].activations
    batch = plan(Precision.INT8, work(512, 512, batch=2)).stages
    assert batch[Program.DENOISER].activations > base[Program.DENOISER].activations
    narrow = plan(Precision.INT4, work(512, 512)).stages
    widened = base[Program.DENOISER].activations - narrow[Program.DENOISER].activations
    assert widened >= 2 * 4 * FULL.config.transformer.dim * FULL.config.transformer.ffn_dim


def test_all_stages_at_once_keep_what_their_runs_took() -> None:
    found = plan(Precision.INT8, work(512, 512, encodes=True))
    assert found.keep_all
    assert found.peak == ORT_WEBGPU.nbytes + sum(stage.total for stage in found.stages.values())
    in_turn = plan(Precision.INT8, work(512, 512, encodes=True), found.peak - 1)
    assert not in_turn.keep_all
    assert in_turn.peak == ORT_WEBGPU.nbytes + max(stage.total for stage in in_turn.stages.values())


@pytest.mark.parametrize("row", MEASURED["programs"] + MEASURED["blocks"], ids=lambda row: row["point"]["program"])
def test_a_plan_is_no_less_than_what_was_measured(row: dict[str, Any]) -> None:
    """On a software adapter, whose allocations are those of a GPU; and not three times as much where it matters."""
    planned = ORT_WEBGPU.nbytes + row["planned"]
    assert planned > row["peak"]
    if row["peak"] > GIB // 2:
        assert planned < 3 * row["peak"]


def test_the_measured_plans_are_todays(bundle: Path) -> None:
    """What the results state is what the factors give: for a block of the published width."""
    config = Bundle.open(bundle).manifest.config
    transformer = replace(FULL.config.transformer, n_layers=1, n_refiner_layers=1, cap_feat_dim=64)
    for row in MEASURED["blocks"]:
        manifest = replace(published(Precision(row["precision"])), config=replace(config, transformer=transformer))
        asked = Work(geometry=image_geometry(512, 512, manifest.config), tokens=32)
        found = WebGpuCosts().activations(Program.DENOISER, manifest, asked, WEBGPU)
        assert row["planned"] == row["weights"] + found
