"""LoRA as they are asked for: what is refused, said, recorded and replayed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_export, call_rt
from facts import assert_facts, raises_with
from lora_tools import drawn, everywhere, lora, written
from schemes import DIM, Tensors, values

from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.adapters.branches import BranchSizes
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.adapters.reader import WeightedAdapter, read_adapter
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, WEBGPU, WEBGPU_FUSED, Precision, extended
from zimage_runtime.errors import AdapterError, BundleError, ExecutorError, RequestError
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.model.branches import (
    ALL_EXTENDED,
)
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import NoticeEvent, Pipeline

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
        "layers.0.attention.to_q.dora_scale": values("m", (1, DIM)),  # of input channels
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


@pytest.mark.parametrize("executor", [CPU, CUDA, WEBGPU])
def test_the_plan_of_another_machine_counts_lora(executor: str, root: Path, tmp_path: Path, capsys: Capture) -> None:
    path = everywhere(tmp_path / "all.safetensors")
    command = ("plan", root, "--executor", executor, "--size", "48x64")
    plain = json.loads(call_rt(capsys, *command, "--json").out)
    found = json.loads(call_rt(capsys, *command, "--lora", f"{path}:0.5", "--json").out)
    nbytes = BranchSizes.of([WeightedAdapter(read_adapter(path, SMALL.config), 0.5)]).nbytes
    assert found["peak"] - plain["peak"] == found["lora"] == nbytes > plain["lora"] == 0
    assert any(line.startswith("lora") for line in call_rt(capsys, *command, "--lora", path).lines)


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


@pytest.mark.parametrize("weight", ["1e5", "-10001", "-inf", "nan"])
def test_weights_beyond_sense(weight: str) -> None:
    with raises_with(AdapterError, "ink.safetensors", "10000"):
        GivenLora.parse(f"ink.safetensors:{weight}")


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
    louder = call_rt(capsys, *replay, "--lora", f"{one}:0.8", "--lora", f"{two}:0.9")
    assert_one_line_error(louder, f"--lora {two}:0.9", image, -0.3)
    done = call_rt(capsys, *replay, "--lora", f"{one}:0.8", "--lora", two)
    assert (done.status, done.err) == (0, "")
    assert read_image_info(again) == info
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(image)), np.asarray(Image.open(again)))

    plain = tmp_path / "plain.png"
    assert call_rt(capsys, *run, "-o", plain).status == 0
    refused = call_rt(capsys, "run", "--replay", plain, "-m", root, "-o", again, "--quiet", "--lora", one)
    assert_one_line_error(refused, plain, "--lora")


def test_values_that_are_not_finite_are_said_to_be_of_the_lora(root: Path, tmp_path: Path) -> None:
    path = everywhere(tmp_path / "loud.safetensors", 1e32)
    with Pipeline.from_bundle(root, "cpu") as pipeline, raises_with(ExecutorError, "step 1", "LoRA"):
        drawn(pipeline, (path, 1e4))


def test_programs_adds_them(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    assert json.loads(call_export(capsys, "programs", copy, "--json", "--quiet").out)["added"] == []
    added = json.loads(call_export(capsys, "programs", copy, "--lora", "--json", "--quiet").out)["added"]
    expected = {(program, extended(CPU)) for program in ALL_EXTENDED}
    on_device = (Program.CAPTION, Program.DENOISER, Program.TOKENS, Program.REFINERS)
    expected |= {(program, extended(name)) for program in on_device for name in (CUDA, WEBGPU)}
    expected |= {(program, extended(WEBGPU_FUSED)) for program in (Program.DENOISER, Program.REFINERS)}
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
