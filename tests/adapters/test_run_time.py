"""LoRA at run time: branches beside the weights, which stay as they are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_tools import with_loud_channels
from lora_tools import CASE, QUIET, adapted, drawn, everywhere, lora, products, written
from parity import Drawing, check_parity, draw, draw_with_diffusers, relative_error
from schemes import DIM, FFN, SCHEMES, values

from zimage_export.build import BuildOptions, build
from zimage_export.programs import add_programs
from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.adapters.branches import NO_BRANCHES, RANK_UNIT, BranchSizes, make_branches
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.adapters.reader import WeightedAdapter, read_adapter
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, Precision, extended
from zimage_runtime.executors.ort.control import no_hints
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.branches import (
    EXTENDED,
    branch_linears,
    columns_input,
    down_input,
    factor_input,
    inner_input,
    outer_input,
    rows_input,
    up_input,
)
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline


@pytest.mark.deep
def test_two_files_are_what_diffusers_loads(checkpoint: Path, root: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    weights = {lora(tmp_path / "one.safetensors", 1): 0.8, lora(tmp_path / "two.safetensors", 2, rank=7): -0.3}
    found = drawn(Pipeline.from_bundle(root), *weights.items())
    with adapted(checkpoint, dict(weights)) as pipeline:
        check_parity(found, draw_with_diffusers(pipeline, CASE))


@pytest.fixture(scope="module")
def merged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Drawing]:
    """A change of every linear, and the image of the model that half of it is merged into, in float32."""
    folder = tmp_path_factory.mktemp("merged")
    path = everywhere(folder / "all.safetensors")
    root = build(checkpoint, folder / "merged", BuildOptions(loras=(GivenLora(str(path), 0.5),)), QUIET).root
    return path, draw(Pipeline.from_bundle(root), CASE)[0]


@pytest.mark.deep
@pytest.mark.parametrize(
    ("precision", "limit"),
    [  # three times what was measured: what a precision loses of the weights
        (Precision.FP32, 3e-6),
        (Precision.BF16, 0.01),
        (Precision.FP16, 0.0013),
        (Precision.INT8, 0.05),
        (Precision.INT4, 0.3),
    ],
)
def test_branches_are_the_merged_model_in_every_precision(
    precision: Precision, limit: float, merged: tuple[Path, Drawing], extended_in: Callable[[Precision], Path]
) -> None:
    path, expected = merged
    pipeline = Pipeline.from_bundle(extended_in(precision))
    assert relative_error(drawn(pipeline).latents, expected.latents) > 0.3, "the change shows"
    assert relative_error(drawn(pipeline, (path, 0.5)).latents, expected.latents) < limit


@pytest.mark.deep
def test_branches_are_multiplied_by_what_int8_weights_were(checkpoint: Path, tmp_path: Path) -> None:
    """With outliers in every activation, factors are far from one."""
    loud = with_loud_channels(checkpoint, tmp_path / "loud")
    loras = (everywhere(tmp_path / "all.safetensors"), 0.4), (products(tmp_path / "lokr.safetensors"), -0.3)
    given = tuple(GivenLora(str(path), weight) for path, weight in loras)
    expected = build(loud, tmp_path / "merged", BuildOptions(loras=given), QUIET)
    int8 = build(loud, tmp_path / "int8", BuildOptions(Precision.INT8), QUIET)
    found = drawn(Pipeline.from_bundle(add_programs(int8, (), QUIET, lora=True).bundle.root), *loras)
    error = relative_error(found.latents, draw(Pipeline.from_bundle(expected.root), CASE)[0].latents)
    assert error < 0.1


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("least_rank", [0, RANK_UNIT])
def test_without_branches_an_extended_program_gives_the_others_bits(
    precision: Precision, least_rank: int, extended_in: Callable[[Precision], Path]
) -> None:
    """Empty matrices, and zeros where a provider takes nothing empty."""
    from zimage_export.measure.self_check import fixed_inputs

    bundle = Bundle.open(extended_in(precision))
    base, other = HostPrograms(bundle), HostPrograms(bundle)
    other.extend()
    for program in EXTENDED:
        feeds = fixed_inputs(SMALL.config)[program]
        inputs = NO_BRANCHES.inputs(program, bundle.manifest, least_rank)
        if program is Program.DENOISER:
            inputs |= no_hints(np.zeros((1, 1, SMALL.config.transformer.dim), np.float32), SMALL.config)
        found, expected = other.run(program, {**feeds, **inputs}), base.run(program, feeds)
        for name, value in expected.items():
            assert np.array_equal(found[name], value), (program, name)


def test_a_then_a_with_lora_then_a(root: Path, tmp_path: Path) -> None:
    path = everywhere(tmp_path / "all.safetensors")
    with Pipeline.from_bundle(root) as pipeline:
        first, second, third = drawn(pipeline), drawn(pipeline, (path, 0.5)), drawn(pipeline)
        assert np.array_equal(first.latents, third.latents)
        assert np.array_equal(first.pixels, third.pixels)
        assert relative_error(second.latents, first.latents) > 0.3
        assert np.array_equal(second.latents, drawn(pipeline, (path, 0.5)).latents)
        assert not np.array_equal(second.latents, drawn(pipeline, (path, 0.4)).latents)


def test_weight_0_is_none_to_the_bit_and_loads_nothing(root: Path, tmp_path: Path) -> None:
    path = everywhere(tmp_path / "all.safetensors")
    with Pipeline.from_bundle(root) as pipeline:
        none, zero = drawn(pipeline), drawn(pipeline, (path, 0.0))
        assert np.array_equal(none.latents, zero.latents)
        assert not pipeline.executor.programs.extended  # type: ignore[attr-defined]
        both = drawn(pipeline, (path, 0.0), (path, 0.5))
        assert np.array_equal(both.latents, drawn(pipeline, (path, 0.5)).latents)


def test_a_pipeline_without_lora_runs_the_base_programs(root: Path, tmp_path: Path) -> None:
    """They are the only ones that there are: an extended program would fail to load."""
    copy = Path(shutil.copytree(root, tmp_path / "bundle"))
    for program in EXTENDED:
        path = Bundle.open(copy).program(program, extended(CPU))
        path.write_bytes(b"\0" * path.stat().st_size)
    with Pipeline.from_bundle(copy) as pipeline:
        assert drawn(pipeline).latents.any()


def test_one_change_in_every_scheme_gives_one_image(root: Path, tmp_path: Path) -> None:
    with Pipeline.from_bundle(root) as pipeline:
        images = {}
        for name in (
            "diffusers",
            "diffusers-rslora",
            "musubi",
            "onetrainer-original",
            "anime",
            "musubi-comfy",
            "native",
        ):
            images[name] = drawn(pipeline, (SCHEMES[name].write(tmp_path / f"{name}.safetensors"), 1.0)).latents
        plain = drawn(pipeline).latents
    assert relative_error(images["diffusers"], plain) > 1e-3
    for name, latents in images.items():
        if name in ("musubi-comfy", "native"):  # a part of a fused projection is summed in another order
            assert relative_error(latents, images["diffusers"]) < 1e-6, name
        else:
            assert np.array_equal(latents, images["diffusers"]), name


def loha(path: Path) -> Path:
    name = "lora_unet_layers_1_feed_forward_w1"
    shapes = {"w1_a": (FFN, 3), "w1_b": (3, DIM), "w2_a": (FFN, 2), "w2_b": (2, DIM)}
    return written(path, {f"{name}.hada_{key}": 4 * values(key, shape) for key, shape in shapes.items()})


@pytest.mark.parametrize("make", [loha, products])
def test_loha_and_lokr_are_the_merged_model(
    make: Callable[[Path], Path], checkpoint: Path, root: Path, tmp_path: Path
) -> None:
    path = make(tmp_path / "x.safetensors")
    merged = build(checkpoint, tmp_path / "merged", BuildOptions(loras=(GivenLora(str(path), -0.5),)), QUIET)
    (expected,) = draw(Pipeline.from_bundle(merged.root), CASE)
    with Pipeline.from_bundle(root) as pipeline:
        first = drawn(pipeline)
        assert relative_error(first.latents, expected.latents) > 1e-3
        assert relative_error(drawn(pipeline, (path, -0.5)).latents, expected.latents) < 1e-5
        assert np.array_equal(drawn(pipeline).latents, first.latents)


def test_the_programs_have_the_branches_that_are_stated() -> None:
    from zimage_export.graphs import Target, build_graph

    for program in EXTENDED:
        graph = build_graph(program, SMALL.config, Target(extended(CPU)))
        linears = branch_linears(program, SMALL.config)
        expected = {}
        for linear in linears:
            rank = f"{linear.name}.rank"
            expected[down_input(linear.name)] = (rank, linear.in_width)
            expected[up_input(linear.name)] = (f"{linear.name}.out", rank)
            products = f"{linear.name}.products"
            expected[outer_input(linear.name)] = (f"{linear.name}.a", f"{linear.name}.b", products)
            expected[inner_input(linear.name)] = (f"{linear.name}.d", products, f"{linear.name}.c")
            expected[factor_input(linear.name)] = (f"{linear.name}.channels",)
            expected[columns_input(linear.name)] = (f"{linear.name}.columns",)
            expected[rows_input(linear.name)] = (f"{linear.name}.rows",)
        assert dict(graph.branches) == expected
        weights = {name.removesuffix(".weight") for name, shape in graph.weights.items() if len(shape) == 2}
        assert {linear.name for linear in linears} == {name for name in weights if not name.endswith("pad_token")}


def test_ranks_are_joined_padded_and_counted(root: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(root)
    loras = [
        WeightedAdapter(read_adapter(lora(tmp_path / f"{rank}.safetensors", rank, rank), SMALL.config), weight)
        for rank, weight in ((9, 0.5), (8, -1.0), (4, 0.0))
    ]
    branches = make_branches(bundle, loras)
    down, up = branches.matrices["layers.0.attention.to_q"]
    assert (down.shape, up.shape) == ((32, DIM), (DIM, 32))
    expected = sum(one.weight * delta.form.rows(0, DIM) for one in loras for delta in one.adapter.deltas[:0]) or 0
    for one in loras:
        (delta,) = [d for d in one.adapter.deltas if d.tensor == "layers.0.attention.to_q.weight"]
        expected = expected + one.weight * delta.form.rows(0, DIM)
    assert np.allclose(up @ down, expected, atol=1e-5)
    assert branches.nbytes == BranchSizes.of(loras).nbytes


def test_the_plan_counts_the_matrices(root: Path, tmp_path: Path) -> None:
    path = everywhere(tmp_path / "all.safetensors")
    with Pipeline.from_bundle(root) as pipeline:
        job = pipeline.prepare(pipeline_request(path))
        plain = pipeline.prepare(pipeline_request())
    nbytes = BranchSizes.of([WeightedAdapter(read_adapter(path, SMALL.config), 1.0)]).nbytes
    assert job.plan.peak - plain.plan.peak == nbytes > 0
    assert job.plan.document()["lora"] == nbytes
    assert any(line.startswith("lora") for line in job.plan.lines())


def pipeline_request(*paths: Path):  # type: ignore[no-untyped-def]
    from zimage_runtime.pipeline import Request

    return Request(CASE.prompt, size=CASE.size, steps=CASE.steps, seed=CASE.seed, loras=paths)
