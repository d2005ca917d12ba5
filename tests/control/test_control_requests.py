"""Control from request to image: what changes nothing, what is recorded, and what is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_export, call_rt
from control_tools import LITE, ONE, TWO, TWO_ONE, Controlled, blot, ours, photograph
from facts import assert_facts, raises_with
from PIL import Image

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.controlnet import ControlNet
from zimage_runtime.bundle.manifest import CPU, Precision, extended
from zimage_runtime.errors import BundleError, RequestError
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import NoticeEvent, Pipeline, Request

Nets = Callable[..., Path]
SIZE = (64, 48)
CASE = Controlled(SIZE, 0.8, 2)


@pytest.mark.deep
def test_no_scale_and_no_steps_are_no_control_to_the_bit(pipeline: Pipeline, bundle: Path, net_of: Nets) -> None:
    """Also in a pipeline that was under control before, and with LoRA's program beside it; and control returns."""
    net = net_of(LITE)
    with Pipeline.from_bundle(bundle, "cpu") as ordinary:
        plain = ours(ordinary, None, CASE)
    none = ours(pipeline, net, Controlled(SIZE, 0.0, 2))
    first = ours(pipeline, net, CASE)
    again = ours(pipeline, net, Controlled(SIZE, 0.0, 2))
    outside = ours(pipeline, net, Controlled(SIZE, 0.8, 2, window=(0.6, 0.9)))
    without = ours(pipeline, None, CASE)
    for found in (none, again, outside, without):
        assert np.array_equal(found.latents, plain.latents)
        assert np.array_equal(found.pixels, plain.pixels)
    pipeline.release()
    second = ours(pipeline, net, CASE)
    assert np.array_equal(first.latents, second.latents)
    assert not np.array_equal(first.latents, plain.latents)


@pytest.mark.deep
def test_a_window_without_steps_is_said(pipeline: Pipeline, net_of: Nets) -> None:
    given: dict[str, Any] = {
        "control": Image.new("RGB", SIZE),
        "controlnet": net_of(LITE),
        "steps": 2,
        "size": SIZE,
        "seed": 1,
    }
    said = {
        window: [
            event.text
            for event in pipeline.stream("a fox", **given, control_start=window[0], control_end=window[1])
            if isinstance(event, NoticeEvent) and "no effect" in event.text
        ]
        for window in ((0.6, 0.9), (0.0, 1.0))
    }
    assert not said[0.0, 1.0]
    (text,) = said[0.6, 0.9]
    assert_facts(text, "0.6", "0.9")


def test_folders_and_sizes_in_turn(pipeline: Pipeline, net_of: Nets) -> None:
    one, other = net_of(LITE), net_of(TWO)
    wide = Controlled((80, 48), 0.8, 2)
    first, between, again = ours(pipeline, one, CASE), ours(pipeline, other, wide), ours(pipeline, one, CASE)
    assert np.array_equal(first.latents, again.latents)
    with Pipeline.from_bundle(pipeline.bundle.root, "cpu") as fresh:
        assert np.array_equal(ours(fresh, other, wide).latents, between.latents)


@pytest.mark.deep
def test_a_source_image_and_another_sampler_go_with_control(pipeline: Pipeline, net_of: Nets) -> None:
    """Windows count the steps that are taken: of 4 steps from half of the way, the first is at 0."""
    given = {"image": photograph(*SIZE, 2), "strength": 0.5, "sampler": "heun", "steps": 4}
    plain = ours(pipeline, None, CASE, **given)
    every = ours(pipeline, net_of(LITE), CASE, **given)
    first = ours(pipeline, net_of(LITE), Controlled(SIZE, 0.8, window=(0.0, 0.5)), **given)
    none = ours(pipeline, net_of(LITE), Controlled(SIZE, 0.8, window=(0.1, 0.4)), **given)
    assert np.array_equal(none.latents, plain.latents)
    for one, other in ((plain, every), (plain, first), (every, first)):
        assert np.abs(one.latents - other.latents).max() > 1e-3


@pytest.mark.deep
def test_run_records_and_replays(root: Path, net_of: Nets, tmp_path: Path, capsys: Capture) -> None:
    given, other = tmp_path / "map.png", tmp_path / "other.png"
    photograph(*SIZE).save(given)
    photograph(*SIZE, 2).save(other)
    net, first, again = net_of(TWO_ONE), tmp_path / "first.png", tmp_path / "again.png"
    control = ("--control", given, "--controlnet", net)
    run = ("run", "a fox", "-m", root, "--seed", 3, "--steps", 2, "--quiet", "--executor", "cpu")
    settings = ("--control-scale", 0.9, "--control-end", 0.5, "--control-type", "canny")
    assert call_rt(capsys, *run, *control, *settings, "-o", first).status == 0
    info = read_image_info(first)
    assert (info.width, info.height) == SIZE
    assert (info.control_scale, info.control_start, info.control_end, info.control_type) == (0.9, 0, 0.5, "canny")
    assert info.controlnet_hash == ControlNet.open(net).manifest.fingerprint
    text = Image.open(first).info["parameters"]
    assert "ControlNet 0" in text
    assert "Weight: 0.9" in text
    replay = ("run", "--replay", first, "-m", root, "--quiet", "--executor", "cpu", "-o", again)
    assert call_rt(capsys, *replay, *control).status == 0
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))

    assert_one_line_error(call_rt(capsys, *replay), first, "--control")
    assert_one_line_error(call_rt(capsys, *replay, "--control", given), first, "--controlnet")
    assert_one_line_error(call_rt(capsys, *replay, "--control", other, "--controlnet", net), other)
    wrong = ("--control", given, "--controlnet", net_of(LITE))
    assert_one_line_error(call_rt(capsys, *replay, *wrong), net_of(LITE), "2.1-fp32")
    plain = tmp_path / "plain.png"
    assert call_rt(capsys, *run, "--size", "64x48", "-o", plain).status == 0
    assert_one_line_error(
        call_rt(capsys, "run", "--replay", plain, "-m", root, "--quiet", *control), plain, "--control"
    )


@pytest.mark.deep
def test_edges_of_a_photograph(pipeline: Pipeline, net_of: Nets) -> None:
    import cv2

    image = photograph(*SIZE)
    edges = Image.fromarray(cv2.Canny(np.asarray(image), 100, 200)).convert("RGB")
    assert 0 < np.mean(np.asarray(edges) == 255) < 0.5
    made = ours(pipeline, net_of(LITE), CASE, control=image, control_type="canny")
    given = ours(pipeline, net_of(LITE), CASE, control=edges)
    assert np.array_equal(made.latents, given.latents)


def test_edges_need_opencv(pipeline: Pipeline, net_of: Nets, monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_runtime.images import control_image

    monkeypatch.setattr(control_image, "find_spec", lambda name: None)
    with raises_with(RequestError, "pip install 'zimage-rt[control]'"):
        ours(pipeline, net_of(LITE), CASE, control_type="canny")


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"control": None}, ("control", "controlnet")),
        ({"controlnet": None}, ("control", "controlnet")),
        ({"controlnet": 5}, ("controlnet", "int")),
        ({"control": 5}, ("control", "int")),
        ({"control_scale": -0.1}, ("control_scale", "-0.1")),
        ({"control_scale": float("nan")}, ("control_scale", "nan")),
        ({"control_scale": True}, ("control_scale", "True")),
        ({"control_start": 0.5, "control_end": 0.5}, ("control_start", "0.5")),
        ({"control_end": 1.5}, ("control_end", "1.5")),
        ({"control_type": "pose"}, ("control_type", "canny", "'pose'")),
        ({"control": None, "controlnet": None, "control_scale": 1.0}, ("control_scale",)),
    ],
    ids=str,
)
def test_values_that_are_none(pipeline: Pipeline, net_of: Nets, given: dict[str, Any], facts: tuple[str, ...]) -> None:
    asked = {"control": photograph(*SIZE), "controlnet": net_of(LITE)} | given
    with raises_with(RequestError, *facts):
        pipeline.stream("a fox", size=SIZE, **asked)


@pytest.mark.parametrize(("size", "fits"), [((60, 48), True), ((56, 48), True), ((96, 48), False), ((32, 96), False)])
def test_the_control_image_has_the_shape_of_the_image(
    pipeline: Pipeline, net_of: Nets, size: tuple[int, int], fits: bool
) -> None:
    asked = {"size": SIZE, "control": photograph(*size), "controlnet": net_of(LITE)}
    if fits:
        pipeline.stream("a fox", **asked)
        return
    with raises_with(RequestError, "control image", f"{size[0]}x{size[1]}", "64x48"):
        pipeline.stream("a fox", **asked)


def test_a_control_image_decides_the_size(pipeline: Pipeline, net_of: Nets) -> None:
    geometry = pipeline.prepare(Request("a fox", control=photograph(83, 50), controlnet=net_of(LITE))).geometry
    assert (geometry.width, geometry.height) == (80, 48)


def test_transparent_control_images_are_refused(pipeline: Pipeline, net_of: Nets) -> None:
    with raises_with(RequestError, "control image", "transparent"):
        pipeline.stream("a fox", size=SIZE, control=Image.new("RGBA", SIZE), controlnet=net_of(LITE))


def test_version_one_takes_no_mask(pipeline: Pipeline, net_of: Nets) -> None:
    asked = {"image": photograph(*SIZE), "mask": blot(*SIZE), "control": photograph(*SIZE)}
    with raises_with(RequestError, net_of(ONE), "1.0", "mask"):
        pipeline.stream("a fox", controlnet=net_of(ONE), **asked)
    pipeline.stream("a fox", controlnet=net_of(LITE), **asked)


def changed(net: Path, out: Path, **config: Any) -> Path:
    """A copy whose manifest says something else of its dimensions."""
    copy = Path(shutil.copytree(net, out))
    document = json.loads((copy / "manifest.json").read_text("utf-8"))
    document["config"] |= config
    (copy / "manifest.json").write_text(json.dumps(document), "utf-8")
    return copy


@pytest.mark.parametrize(
    ("config", "facts"), [({"dim": 192}, (192, 96)), ({"places": [0, 7]}, (7, 2)), ({"n_refiner_layers": 1}, (1, 2))]
)
def test_a_controlnet_of_another_model(
    pipeline: Pipeline, net_of: Nets, tmp_path: Path, config: dict[str, Any], facts: tuple[int, ...]
) -> None:
    net = changed(net_of(LITE), tmp_path / "net", **config)
    with raises_with(RequestError, net, "another model", *facts):
        pipeline.stream("a fox", size=SIZE, control=photograph(*SIZE), controlnet=net)


def test_folders_that_are_no_controlnet(pipeline: Pipeline, net_of: Nets, root: Path, tmp_path: Path) -> None:
    asked = {"size": SIZE, "control": photograph(*SIZE)}
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"x")
    for path, facts in (
        (root, ("bundle", "-m")),
        (file, (f"zimage-export controlnet {file}",)),
        (tmp_path, ("zimage-export controlnet",)),
        (tmp_path / "none", ("no such ControlNet",)),
    ):
        with raises_with(BundleError, path, *facts):
            pipeline.stream("a fox", controlnet=path, **asked)
    with raises_with(BundleError, net_of(LITE), "--controlnet"):
        Pipeline.from_bundle(net_of(LITE))


def test_a_damaged_controlnet(pipeline: Pipeline, net_of: Nets, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(net_of(LITE), tmp_path / "net"))
    asked = {"size": SIZE, "control": photograph(*SIZE), "controlnet": copy}
    with (copy / "weights.safetensors").open("r+b") as file:
        file.truncate(1000)
    with raises_with(BundleError, copy / "weights.safetensors", 1000):
        pipeline.stream("a fox", **asked)
    (copy / "weights.safetensors").unlink()
    with raises_with(BundleError, copy / "weights.safetensors", "missing"):
        pipeline.stream("a fox", **asked)
    document = json.loads((copy / "manifest.json").read_text("utf-8"))
    for change, fact in (
        ({"schema_version": 2}, "schema"),
        ({"precision": "fp2"}, "'fp2'"),
        ({"weights": "../w"}, "'../w'"),
    ):
        (copy / "manifest.json").write_text(json.dumps(document | change), "utf-8")
        with raises_with(BundleError, copy / "manifest.json", fact):
            pipeline.stream("a fox", **asked)


def test_a_bundle_without_the_programs_names_the_command(bundle: Path, net_of: Nets) -> None:
    asked = {"size": SIZE, "control": photograph(*SIZE), "controlnet": net_of(LITE)}
    with Pipeline.from_bundle(bundle, "cpu") as ordinary, raises_with(BundleError, f"programs {bundle} --control"):
        ordinary.stream("a fox", **asked)


@pytest.mark.deep
def test_programs_replaces_those_that_take_no_hints(
    extended_in: Callable[[Precision], Path], net_of: Nets, tmp_path: Path, capsys: Capture
) -> None:
    """As they were before there was control: a denoiser without hints, and nothing that a ControlNet needs besides."""
    import onnx

    copy = Path(shutil.copytree(extended_in(Precision.FP32), tmp_path / "bundle"))
    opened = Bundle.open(copy)
    record = opened.manifest.record(Program.DENOISER, extended(CPU))
    assert record is not None
    path = copy / record.path
    model = onnx.load(str(path), load_external_data=False)
    kept = [value for value in model.graph.input if not value.name.startswith("hint.")]
    assert len(kept) < len(model.graph.input)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    path.write_bytes(model.SerializeToString())
    document = json.loads((copy / "manifest.json").read_text("utf-8"))
    for program in ("timestep", "tokens", "refiners"):
        del document["programs"][program]
    document["files"][record.path]["size"] = path.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(document), "utf-8")
    with Pipeline.from_bundle(copy, "cpu") as older, raises_with(BundleError, f"programs {copy} --control"):
        ours(older, net_of(LITE), CASE)

    added = json.loads(call_export(capsys, "programs", copy, "--control", "--json", "--quiet").out)["added"]
    names = {(one["program"], one["name"]) for one in added}
    assert ("denoiser", "cpu-extended") in names
    assert ("refiners", "cpu-extended") in names
    assert ("denoiser", "cuda-extended") not in names, "it is of today's form"
    assert not path.exists(), "the older program is left"
    renewed = Bundle.open(copy)
    assert renewed.manifest.fingerprint == opened.manifest.fingerprint
    assert json.loads(call_export(capsys, "programs", copy, "--control", "--json", "--quiet").out)["added"] == []
    with Pipeline.from_bundle(copy, "cpu") as pipeline, Pipeline.from_bundle(opened.root, "cpu") as other:
        assert np.array_equal(ours(pipeline, net_of(LITE), CASE).latents, ours(other, net_of(LITE), CASE).latents)


@pytest.mark.parametrize(
    "given",
    [("--control", "map.png"), ("--controlnet", "net"), ("--control-scale", "1"), ("--control-type", "canny")],
    ids=str,
)
def test_options_that_need_each_other(given: tuple[str, str], capsys: Capture) -> None:
    outcome = call_rt(capsys, "run", "a fox", *given)
    assert outcome.status == 2
    assert "--control" in outcome.err
