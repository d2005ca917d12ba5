"""LoRA at run time: branches beside the weights, which stay as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_tools import with_loud_channels
from cli_tools import Capture, assert_one_line_error, call_export, call_rt
from facts import assert_facts, raises_with
from parity import Case, Drawing, check_parity, draw, draw_with_diffusers, relative_error
from safetensors.numpy import save_file
from schemes import DIM, FFN, SCHEMES, Tensors, under, values
from test_merging import adapted, lora

from zimage_export.build import BuildOptions, build
from zimage_export.programs import add_programs
from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.adapters.branches import NO_BRANCHES, RANK_UNIT, branch_bytes, make_branches
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.adapters.reader import WeightedAdapter, read_adapter
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, WEBGPU, WEBGPU_FUSED, Precision, extended
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import AdapterError, BundleError, RequestError
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.model.branches import (
    EXTENDED,
    branch_linears,
    columns_input,
    down_input,
    inner_input,
    outer_input,
    rows_input,
    up_input,
)
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import ImageEvent, NoticeEvent, Pipeline

QUIET = Progress(quiet=True)
CASE = Case("a red fox in the snow", size=(48, 64), steps=2, seed=3)
Given = tuple[Path | str, float]


@pytest.fixture
def root(extended_in: Callable[[Precision], Path]) -> Path:
    return extended_in(Precision.FP32)


def drawn(pipeline: Pipeline, *loras: Given, case: Case = CASE) -> Drawing:
    events = pipeline.stream(case.prompt, size=case.size, steps=case.steps, seed=case.seed, loras=loras)
    (found,) = [Drawing(e.latents, np.asarray(e.image)) for e in events if isinstance(e, ImageEvent)]
    return found


def written(path: Path, tensors: Tensors) -> Path:
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def everywhere(path: Path, scale: float = 0.3) -> Path:
    """A change of every linear of the transformer: embedders, refiners, modulation and the ends included."""
    tensors = {}
    for linear in (linear for program in EXTENDED for linear in branch_linears(program, SMALL.config)):
        rng = np.random.default_rng(list(linear.name.encode()))
        down, up = rng.standard_normal((3, linear.in_width)), rng.standard_normal((linear.out_width, 3))
        tensors[f"lora_unet_{under(linear.name)}.lora_down.weight"] = (down / linear.in_width**0.5).astype(np.float32)
        tensors[f"lora_unet_{under(linear.name)}.lora_up.weight"] = (scale * up).astype(np.float32)
    return written(path, tensors)


def products(path: Path) -> Path:
    """The same as LoKr: a product of [8, 8] and what is left."""
    tensors = {}
    for linear in (linear for program in EXTENDED for linear in branch_linears(program, SMALL.config)):
        rng = np.random.default_rng(list(linear.name.encode()))
        inner = rng.standard_normal((linear.out_width // 8, linear.in_width // 8)) / linear.in_width**0.5
        tensors[f"lycoris_{under(linear.name)}.lokr_w1"] = rng.standard_normal((8, 8)).astype(np.float32)
        tensors[f"lycoris_{under(linear.name)}.lokr_w2"] = inner.astype(np.float32)
    return written(path, tensors)


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
            expected[up_input(linear.name)] = (linear.out_width, rank)
            expected[outer_input(linear.name)] = (f"{linear.name}.a", f"{linear.name}.b")
            expected[inner_input(linear.name)] = (f"{linear.name}.d", f"{linear.name}.c")
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
    assert branches.nbytes == branch_bytes(loras)


def test_the_plan_counts_the_matrices(root: Path, tmp_path: Path) -> None:
    path = everywhere(tmp_path / "all.safetensors")
    with Pipeline.from_bundle(root) as pipeline:
        job = pipeline.prepare(pipeline_request(path))
        plain = pipeline.prepare(pipeline_request())
    nbytes = branch_bytes([WeightedAdapter(read_adapter(path, SMALL.config), 1.0)])
    assert job.plan.peak - plain.plan.peak == nbytes > 0
    assert job.plan.document()["lora"] == nbytes
    assert any(line.startswith("lora") for line in job.plan.lines())


def pipeline_request(*paths: Path):  # type: ignore[no-untyped-def]
    from zimage_runtime.pipeline import Request

    return Request(CASE.prompt, size=CASE.size, steps=CASE.steps, seed=CASE.seed, loras=paths)


REFUSED: dict[str, Tensors] = {
    "whole": {"layers.0.attention_norm1.diff": values("n", (DIM,))},
    "bias": {"layers.0.adaLN_modulation.0.diff_b": values("n", (4 * DIM,))},
    "text": {
        "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj.lora_A.weight": values("a", (2, 64)),
        "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj.lora_B.weight": values("b", (128, 2)),
    },
    "dora": {
        "layers.0.attention.to_q.lora_A.weight": values("a", (2, DIM)),
        "layers.0.attention.to_q.lora_B.weight": values("b", (DIM, 2)),
        "layers.0.attention.to_q.dora_scale": values("m", (DIM, 1)),
    },
    "lokr-cut": {  # a third of whose rows is no product
        "layers.0.attention.qkv.lokr_w1": values("a", (4, 8)),
        "layers.0.attention.qkv.lokr_w2": values("b", (72, 12)),
    },
    "large-loha": {
        f"layers.0.attention.to_q.hada_{key}": values(key, shape)
        for key, shape in {"w1_a": (DIM, 20), "w1_b": (20, DIM), "w2_a": (DIM, 20), "w2_b": (20, DIM)}.items()
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_branch_is_refused_with_the_line_that_merges_it(case: str, root: Path, tmp_path: Path) -> None:
    path = written(tmp_path / f"{case}.safetensors", REFUSED[case])
    with Pipeline.from_bundle(root) as pipeline, raises_with(AdapterError, path, f"--lora {path}:0.5", "zimage-export"):
        pipeline.stream("a fox", loras=[(path, 0.5)])


def test_two_lokr_of_one_layer_are_refused_and_of_weight_0_they_are_none(root: Path, tmp_path: Path) -> None:
    one, two = products(tmp_path / "one.safetensors"), products(tmp_path / "two.safetensors")
    with Pipeline.from_bundle(root) as pipeline:
        with raises_with(AdapterError, two, "LoKr", f"--lora {two}:0.5"):
            pipeline.stream("a fox", loras=[(one, 1.0), (two, 0.5)])
        pipeline.stream("a fox", size=(48, 64), loras=[(one, 0.0), (two, 0.5)])


def test_a_bundle_without_the_programs_names_the_command(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    path = everywhere(tmp_path / "all.safetensors")
    with Pipeline.from_bundle(bundle) as pipeline, raises_with(BundleError, bundle, f"programs {bundle} --lora"):
        pipeline.stream("a fox", size=(48, 64), loras=[path])


def test_an_int8_bundle_without_its_factors_is_refused(
    extended_in: Callable[[Precision], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(extended_in(Precision.INT8), tmp_path / "bundle"))
    document = json.loads((copy / "manifest.json").read_text("utf-8"))
    document["rebalancing"] = {}
    (copy / "manifest.json").write_text(json.dumps(document), "utf-8")
    path = everywhere(tmp_path / "all.safetensors")
    with Pipeline.from_bundle(copy) as pipeline, raises_with(BundleError, copy, "export", "transformer"):
        drawn(pipeline, (path, 1.0))


@pytest.mark.parametrize("given", ["x.safetensors", [5], [("x", "y")], [("x", True)], [("x", float("nan"))]])
def test_loras_that_are_none(given: object, root: Path) -> None:
    with Pipeline.from_bundle(root) as pipeline, pytest.raises(RequestError):
        pipeline.stream("a fox", loras=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "steps", "cfg_scale", "facts"),
    [
        ("z-image-4steps", 8, 1.0, (4, 8)),
        ("z-image-4steps", 4, 1.0, None),
        ("z-image-4steps", 4, 3.0, ("--cfg-scale",)),
        ("Z-Image-Lightning-8-step", 28, 1.0, (8, 28)),
        ("fox-2000steps", 8, 1.0, None),
        ("fox", 30, 4.0, None),
    ],
)
def test_what_a_distilled_lora_is_not_made_for_is_said(
    name: str, steps: int, cfg_scale: float, facts: tuple[object, ...] | None, root: Path, tmp_path: Path
) -> None:
    path = lora(tmp_path / f"{name}.safetensors", 1)
    with Pipeline.from_bundle(root) as pipeline:
        from zimage_runtime.pipeline import Request

        job = pipeline.prepare(Request("a fox", size=(48, 64), steps=steps, cfg_scale=cfg_scale, loras=[path]))
    said = [notice for notice in job.notices if name in notice.text]
    if facts is None:
        assert said == []
    else:
        (notice,) = said
        assert notice.warning
        assert_facts(notice.text, name, *facts)


def test_run_records_its_lora_and_replays_with_it(root: Path, tmp_path: Path, capsys: Capture) -> None:
    one, two = lora(tmp_path / "one.safetensors", 1), lora(tmp_path / "two, the second.safetensors", 2)
    image, again = tmp_path / "a.png", tmp_path / "b.png"
    run = ("run", "a fox", "-m", root, "--size", "48x64", "--steps", 2, "--seed", 3, "--executor", "cpu", "--quiet")
    made = call_rt(capsys, *run, "-o", image, "--lora", f"{one}:0.8", "--lora", f"{two}:-0.3")
    assert (made.status, made.err) == (0, "")
    info = read_image_info(image)
    assert info is not None
    hashes = [read_adapter(path, SMALL.config).hash for path in (one, two)]
    assert [(x.name, x.weight, x.hash) for x in info.loras] == [
        ("one", 0.8, hashes[0]),
        ("two, the second", -0.3, hashes[1]),
    ]
    expected = f'Lora hashes: "one: {hashes[0][:12]}, two, the second: {hashes[1][:12]}"'
    assert expected in info.parameters()
    assert json.loads(info.replay())["version"] == 5

    replay = ("run", "--replay", image, "-m", root, "--executor", "cpu", "-o", again, "--quiet")
    assert_one_line_error(call_rt(capsys, *replay), image, "one", hashes[0][:12], "--lora")
    wrong = call_rt(capsys, *replay, "--lora", two, "--lora", one)
    assert_one_line_error(wrong, f"--lora {two}", hashes[0][:12], hashes[1][:12])
    done = call_rt(capsys, *replay, "--lora", one, "--lora", two)
    assert (done.status, done.err) == (0, "")
    assert read_image_info(again) == info
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(image)), np.asarray(Image.open(again)))

    plain = tmp_path / "plain.png"
    assert call_rt(capsys, *run, "-o", plain).status == 0
    refused = call_rt(capsys, "run", "--replay", plain, "-m", root, "-o", again, "--quiet", "--lora", one)
    assert_one_line_error(refused, plain, "--lora")


def test_programs_adds_them(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    assert json.loads(call_export(capsys, "programs", copy, "--json", "--quiet").out)["added"] == []
    added = json.loads(call_export(capsys, "programs", copy, "--lora", "--json", "--quiet").out)["added"]
    expected = {(program, extended(CPU)) for program in EXTENDED}
    expected |= {
        (program, extended(name)) for program in (Program.CAPTION, Program.DENOISER) for name in (CUDA, WEBGPU)
    }
    expected.add((Program.DENOISER, extended(WEBGPU_FUSED)))
    assert {(Program(a["program"]), a["name"]) for a in added} == expected
    assert Bundle.open(copy).manifest.executors == Bundle.open(bundle).manifest.executors
    assert Bundle.open(copy).manifest.fingerprint == Bundle.open(bundle).manifest.fingerprint


def test_tensors_that_are_left_out_are_listed(root: Path, tmp_path: Path) -> None:
    from zimage_runtime.pipeline import Request

    module = "layers.0.attention.to_q"
    tensors = {
        "layers.99.attention.to_q.lora_A.weight": values("x", (2, 2)),
        f"{module}.lora_A.weight": values("a", (2, DIM)),
        f"{module}.lora_B.weight": values("b", (DIM, 2)),
    }
    path = written(tmp_path / "x.safetensors", tensors)
    with Pipeline.from_bundle(root) as pipeline:
        with raises_with(AdapterError, path, "--lora-allow-unused"):
            pipeline.prepare(Request("a fox", size=(48, 64), loras=[path]))
        job = pipeline.prepare(Request("a fox", size=(48, 64), loras=[path], lora_allow_unused=True))
    notices = [n for n in job.notices if isinstance(n, NoticeEvent) and "layers.99.attention" in n.text]
    assert len(notices) == 1
