"""The demo model's ControlNet, which is in the repository: the published layout, and shapes that land on their maps."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_tools import Capture, call_export, call_rt
from PIL import Image

from demo_model.landing import judge_landing, map_requests
from demo_model.scenes import Scene, draw
from zimage_export.source.checkpoint import DEMO
from zimage_rt import demo_bundle

CONTROLNET = DEMO.with_name("tiny_controlnet")
WEIGHTS = CONTROLNET / "diffusion_pytorch_model.safetensors"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "control_places.json"


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """One thread: faster at this size, where threads mostly wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def painted(scene: Scene) -> np.ndarray:
    return np.rint(draw(scene, 128, 128) * 255).astype(np.uint8)


def test_a_picture_of_the_scene_itself_lands_and_a_moved_one_does_not() -> None:
    moved = 0
    for request in map_requests(12):
        verdict = judge_landing(request, painted(request.scene))
        assert verdict.overlap == verdict.coloured > 0.9
        assert verdict.shapes
        things = request.scene.things
        if all(abs(thing.x - 0.5) > 0.75 * thing.radius for thing in things):  # or the mirrored one overlaps
            mirrored = tuple(replace(thing, x=1 - thing.x) for thing in things)
            moved += 1
            assert not judge_landing(request, painted(replace(request.scene, things=mirrored))).landed
    assert moved >= 3


def test_a_shape_in_another_colour_has_landed_but_not_in_its_own() -> None:
    request = map_requests(1)[0]
    others = tuple(replace(thing, colour="purple") for thing in request.scene.things)
    assert "purple" not in {thing.colour for thing in request.scene.things}
    verdict = judge_landing(request, painted(replace(request.scene, things=others)))
    assert verdict.landed
    assert not verdict.landed_coloured
    assert not verdict.shapes


def test_of_two_objects_both_must_land() -> None:
    request = next(one for one in map_requests(12) if len(one.scene.things) == 2)
    first, second = request.scene.things
    for kept in (first, second):
        verdict = judge_landing(request, painted(replace(request.scene, things=(kept,))))
        assert not verdict.landed
        assert not verdict.shapes


def test_the_file_is_as_published_ones_of_version_2_1_are() -> None:
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size < 4.1e6
    with safe_open(WEIGHTS, "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        types = {file.get_slice(name).get_dtype() for name in shapes}
    assert types == {"BF16"}
    assert {name.split(".")[0] for name in shapes} == {
        "control_all_x_embedder",
        "control_layers",
        "control_noise_refiner",
    }
    assert shapes["control_all_x_embedder.2-1.weight"] == [192, 4 * 33]
    first = {name for name in shapes if name.endswith("before_proj.weight")}
    assert first == {"control_layers.0.before_proj.weight", "control_noise_refiner.0.before_proj.weight"}
    last = {name for name in shapes if name.endswith("after_proj.weight")}
    assert last == {
        f"{block}.after_proj.weight" for block in ("control_layers.0", "control_layers.1", "control_noise_refiner.0")
    }
    assert json.loads((CONTROLNET / "config.json").read_text("utf-8"))["control_layers_places"] == [0, 2]


@pytest.mark.deep
def test_run_lets_shapes_land_where_the_map_puts_them(capsys: Capture, tmp_path: Path) -> None:
    bundle, net, edges, out = (tmp_path / name for name in ("bundle", "net", "edges.png", "image.png"))
    shutil.copytree(demo_bundle(), bundle)
    assert call_export(capsys, "programs", bundle, "--control", "--executor", "cpu", "--quiet").status == 0
    assert call_export(capsys, "controlnet", CONTROLNET, net, "--precision", "fp16", "--quiet").status == 0
    landed = {"with": 0, "without": 0}
    requests = map_requests(5)[2:]
    assert {len(request.scene.things) for request in requests} == {1, 2}
    for request in requests:
        Image.fromarray(request.edges).save(edges)
        for which, control in (("with", ("--control", edges, "--controlnet", net)), ("without", ())):
            words = ("--size", "128x128", "--seed", 5, "-o", out, "--quiet", "--executor", "cpu")
            out.unlink(missing_ok=True)
            outcome = call_rt(capsys, "run", request.prompt, "-m", bundle, *control, *words)
            assert outcome.status == 0, outcome.err
            landed[which] += judge_landing(request, np.asarray(Image.open(out))).landed
    assert landed["with"] == 3
    assert landed["without"] <= 1


@pytest.mark.deep
def test_diffusers_takes_the_folder(torch_threads: None) -> None:
    import torch
    from diffusers import ZImageControlNetModel, ZImageControlNetPipeline, ZImagePipeline

    base = ZImagePipeline.from_pretrained(DEMO, dtype=torch.float32)
    net = ZImageControlNetModel.from_pretrained(CONTROLNET).float()
    assert all(float(p.detach().abs().max()) > 0 for p in net.parameters())  # none was missing, and stayed zero
    net = ZImageControlNetModel.from_transformer(net, base.transformer)
    controlled = ZImageControlNetPipeline(**base.components, controlnet=net)
    controlled.set_progress_bar_config(disable=True)
    request = map_requests(5)[-1]
    image = controlled(
        request.prompt,
        control_image=Image.fromarray(request.edges),
        width=128,
        height=128,
        num_inference_steps=8,
        guidance_scale=0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert judge_landing(request, np.asarray(image)).landed


def test_the_model_card_states_what_was_measured() -> None:
    card = (CONTROLNET / "README.md").read_text("utf-8")
    report = json.loads(RESULTS.read_text("utf-8"))
    scores = report["scores"]
    assert report["maps"] >= 50
    assert scores["with"]["all"]["maps"] == scores["without"]["all"]["maps"] == report["maps"]
    assert scores["with"]["all"]["landed"] >= 0.9
    assert scores["without"]["all"]["landed"] <= 0.4
    for which, groups in scores.items():
        for group, one in groups.items():
            (row,) = re.findall(rf"^\| {which} the ControlNet, {group} \|.*$", card, re.M)
            assert re.findall(r"[\d.]+ %", row) == [
                f"{100 * one[share]:.0f} %" for share in ("landed", "landed_coloured", "shapes")
            ]
