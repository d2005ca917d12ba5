"""What an image takes of a GPU's memory is planned before anything is loaded, and the plan keeps its word."""

import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from facts import assert_facts, memory_amounts, raises_with

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Manifest, Precision
from zimage_runtime.errors import MemoryLimitError
from zimage_runtime.executors.ort.cuda_plan import plan_vram, predict_vram
from zimage_runtime.executors.ort.device_plan import VramPlan, tile_values
from zimage_runtime.executors.overheads import ORT_CUDA
from zimage_runtime.executors.protocol import Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program
from zimage_runtime.tiles.tiling import tiled_bytes, tiled_encoder_bytes

PLENTY = 1 << 50
CONTEXT = ORT_CUDA.nbytes
GIB = 1 << 30
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def plan(
    manifest: Manifest,
    width: int = 512,
    height: int = 512,
    budget: int = PLENTY,
    *,
    tokens: int = 32,
    batch: int = 1,
    encodes: bool = False,
) -> VramPlan:
    geometry = image_geometry(width, height, manifest.config)
    return plan_vram(manifest, Work(geometry=geometry, tokens=tokens, batch=batch, encodes=encodes), budget)


def test_weights_are_those_that_the_programs_on_the_gpu_use(manifest: Manifest) -> None:
    stages = plan(manifest, encodes=True).stages
    assert set(stages) == set(MODEL_PROGRAMS) - {Program.MODULATION}
    for program, stage in stages.items():
        stored = manifest.programs[program]["cuda"].weight_bytes
        assert 0 < stored <= stage.weights <= 1.04 * stored, "what CUDA rounds up, and no more"


def test_a_smaller_budget_changes_the_plan_step_by_step(manifest: Manifest) -> None:
    together = plan(manifest)
    assert together.keep_all
    assert not together.notes
    assert plan(manifest, budget=together.peak) == VramPlan(**{**vars(together), "budget": together.peak})
    in_turn = plan(manifest, budget=together.peak - 1)
    assert not in_turn.keep_all
    assert not in_turn.tiled
    assert in_turn.peak < together.peak
    assert not plan(manifest, budget=in_turn.peak).tiled
    in_tiles = plan(manifest, budget=in_turn.peak - 1)
    assert in_tiles.tiled
    assert in_tiles.stages[Program.DECODER].total < in_turn.stages[Program.DECODER].total
    assert in_tiles.peak <= in_tiles.budget
    assert in_tiles.host >= tiled_bytes(manifest.config.vae, 512, 512)
    (note,) = in_tiles.notes
    assert_facts(note, "decoded", "tiles", "GPU")
    assert "encoded" not in note
    with pytest.raises(MemoryLimitError):
        plan(manifest, budget=CONTEXT + max(stage.total for p, stage in in_turn.stages.items() if p != "decoder") - 1)


def plan_or_refusal(
    manifest: Manifest, width: int, height: int, budget: int, batch: int, encodes: bool
) -> VramPlan | MemoryLimitError:
    try:
        return plan(manifest, width, height, budget, batch=batch, encodes=encodes)
    except MemoryLimitError as refusal:
        return refusal


def test_no_plan_goes_over_its_budget(manifest: Manifest) -> None:
    """Of many budgets, sizes and batches, every plan that is made fits, and every refusal names one that does."""
    refused = made = 0
    for width, height, batch in ((64, 64, 1), (512, 512, 1), (2048, 1024, 1), (512, 512, 4)):
        for step in range(1, 30):
            budget = CONTEXT + (step * step << 20)
            encodes = step % 2 == 0
            found = plan_or_refusal(manifest, width, height, budget, batch, encodes)
            if isinstance(found, VramPlan):
                made += 1
                assert found.peak <= budget
                continue
            refused += 1
            assert_facts(str(found), f"{width}x{height}", "--size", "--executor cpu")
            match = re.search(r"--vram ([\d.]+)GiB", str(found))
            assert match, str(found)
            named = int(float(match[1]) * GIB)
            assert named > budget
            plan(manifest, width, height, named, batch=batch, encodes=encodes)
    assert refused > 5
    assert made > 20


def test_every_part_of_a_request_counts(manifest: Manifest) -> None:
    base = plan(manifest).stages
    for other in (plan(manifest, 1024, 512), plan(manifest, 512, 1024)):
        for program in (Program.DENOISER, Program.DECODER):
            assert other.stages[program].activations > base[program].activations
    assert plan(manifest, batch=2).stages[Program.DENOISER].activations > base[Program.DENOISER].activations
    longer = plan(manifest, tokens=300).stages
    for program in (Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER):
        assert longer[program].activations > base[program].activations
    assert Program.ENCODER not in base


def test_the_image_to_start_from_may_be_encoded_in_tiles(manifest: Manifest) -> None:
    stages = plan(manifest, 2048, 2048, encodes=True).stages
    smaller = min(stages[Program.ENCODER].total, stages[Program.DECODER].total)
    found = plan(manifest, 2048, 2048, CONTEXT + smaller - 1, encodes=True)
    assert found.encodes_tiled
    assert found.tiled
    assert_facts(found.notes[0], "encoded", "decoded", "tiles", "GPU")
    vae = manifest.config.vae
    assert found.host >= max(tiled_bytes(vae, 2048, 2048), tiled_encoder_bytes(vae, 2048, 2048))


def test_tiles_grow_with_the_budget_up_to_a_size(manifest: Manifest) -> None:
    vae = manifest.config.vae
    sizes = [tile_values(megabytes << 20, vae) for megabytes in (0, 10, 100, 1000, 10_000)]
    assert sizes == sorted(sizes)
    assert sizes[-2:] == [1 << 24, 1 << 24]
    assert 0 < sizes[0] < sizes[2] < 1 << 24


@functools.cache
def published(text_layers: int = 36) -> Manifest:
    """The published model in bf16, sized by its graphs, with so many layers of the text encoder."""
    from zimage_export.graphs import Target, build_graphs
    from zimage_export.storage.precision import StoragePolicy
    from zimage_export.synthetic.checkpoint import FULL
    from zimage_runtime.bundle.manifest import Defaults, Origin, ProgramRecord
    from zimage_runtime.bundle.tensors import DType

    config = replace(FULL.config, text_encoder=replace(FULL.config.text_encoder, num_hidden_layers=text_layers))
    policy = StoragePolicy(Precision.BF16, DType.BF16)
    programs: dict[Program, dict[str, ProgramRecord]] = {program: {} for program in MODEL_PROGRAMS}
    for graph in build_graphs(config, Target("cuda", policy)):
        sizes = [
            policy.storage(graph.program.component, name, shape).size * math.prod(shape)
            for name, shape in graph.weights.items()
        ]
        programs[graph.program]["cuda"] = ProgramRecord("x", sum(sizes))
    return Manifest(
        precision=Precision.BF16,
        source=Origin("full"),
        exporter="test",
        config=config,
        defaults=Defaults(1024, 1024, 8),
        programs=programs,
        weights={},
        embeddings="",
        tokenizer="",
        files={},
    )


def test_the_published_model_on_common_cards() -> None:
    """Sums that anyone can check: 32 blocks of 177 million parameters in 16 bits are 10.5 GiB."""
    manifest = published()
    assert 10.5 < manifest.programs[Program.DENOISER]["cuda"].weight_bytes / GIB < 10.6
    assert plan(manifest, 1024, 1024, 80 * GIB).keep_all
    assert not plan(manifest, 1024, 1024, 16 * GIB).keep_all
    with raises_with(MemoryLimitError, "1024x1024", "11.0 GiB") as refusal:
        plan(manifest, 1024, 1024, 11 * GIB)
    assert 11 < memory_amounts(str(refusal.value))[0] < 13


TOLERANCE = 0.1  # of what was measured


def test_the_plan_is_what_an_h100_measured() -> None:
    """NVML's figure for the process at its peak, of each image that came to its end."""
    document = json.loads((RESULTS / "gpu_h100.json").read_text())
    rows = [(name, row) for name, rows in document["pictures"].items() for row in rows if "failed" not in row]
    assert len(rows) >= 6
    for name, row in rows:
        manifest = published(2 if "text encoder of 2 layers" in name else 36)
        budget = int((row["vram"] or document["gpu"]["total"]) * (1 + TOLERANCE))  # the plan may be above what fitted
        found = plan(manifest, *row["size"], budget, tokens=30)
        assert found.keep_all == row["keep_all"], name
        assert found.peak == pytest.approx(row["process_bytes"], rel=TOLERANCE), name


def test_what_the_executor_itself_keeps_is_counted(manifest: Manifest) -> None:
    """It is in no session's arena: tables of a schedule of many steps, and a second prompt's caption tokens."""
    work = Work(geometry=image_geometry(512, 512, manifest.config), tokens=32)
    t = manifest.config.transformer
    row = 4 * t.dim * (4 * (t.n_layers + t.n_refiner_layers) + 1)

    def activations(work: Work) -> int:
        return plan_vram(manifest, work, PLENTY).stages[Program.DENOISER].activations

    assert activations(replace(work, steps=50)) - activations(work) >= 42 * row
    prompt = 4 * 32 * t.dim
    assert activations(replace(work, guided=True)) - activations(work) >= prompt


def test_only_a_bundle_that_is_nearer_to_the_original_is_advised(manifest: Manifest) -> None:
    """bf16 is no advice to the owner of an fp32 bundle, nor fp16 to bf16's."""
    work = Work(geometry=image_geometry(512, 512, manifest.config), tokens=32)
    roomy = 80 * GIB
    assert manifest.precision is Precision.FP32
    advice = {
        precision: predict_vram(replace(manifest, precision=precision), work, roomy, capability).advice
        for capability in ((8, 9), (7, 5))
        for precision in Precision
    }
    assert advice[Precision.FP32] is advice[Precision.BF16] is advice[Precision.FP16] is None
    assert advice[Precision.INT8] is advice[Precision.INT4] is Precision.FP16  # of the last capability, without bf16
    plan = predict_vram(manifest, work, roomy, (8, 9))
    assert not any(line.startswith("advice") for line in plan.lines())
    assert any(line.startswith("other bundles") and "bf16" in line for line in plan.lines())
