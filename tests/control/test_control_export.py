"""A ControlNet's file → its folder: versions told apart, every precision, and files that are none."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_tools import Capture, assert_one_line_error, call_export, call_rt
from control_tools import LITE, MODEL, ONE, TWO, TWO_ONE, Controlled, Version, export, ours, random_tensors
from facts import raises_with
from parity import Drawing, relative_error
from safetensors.numpy import load_file, save_file

from zimage_export.errors import CheckpointError, ExportError
from zimage_export.graphs import PROGRAM_SETS
from zimage_export.graphs.builder import GraphBuilder
from zimage_export.graphs.controlnet import CONTROL_SETS
from zimage_export.source.control_file import open_control_file
from zimage_export.storage.precision import StoragePolicy
from zimage_runtime.bundle.controlnet import ControlNet
from zimage_runtime.bundle.manifest import CUDA, CUDA_WEIGHT_ONLY, WEBGPU, WEBGPU_FUSED, Precision
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.control import Refiner
from zimage_runtime.model.programs import CONTROL_PROGRAMS, Program
from zimage_runtime.model.query_blocks import POSITION_BLOCKS
from zimage_runtime.pipeline import Pipeline

Nets = Callable[..., Path]
Files = Callable[[Version], Path]

CASE = Controlled((64, 48), 0.75, 2)
REFINERS = {ONE: Refiner.PLAIN, TWO: Refiner.LAYERS, TWO_ONE: Refiner.CONTROL, LITE: Refiner.CONTROL}
MOST = {Precision.FP32: 2e-6, Precision.FP16: 2e-3, Precision.BF16: 1e-2, Precision.INT8: 0.06, Precision.INT4: 0.3}
"""Relative error of a hint on random weights, whose distribution no quantization likes."""


def test_versions_are_told_apart_by_their_tensors(version: Version, file_of: Files) -> None:
    file = open_control_file(file_of(version), version.places)
    assert file.config.refiner is REFINERS[version]
    assert file.config.places == version.places
    assert file.config.channels == version.channels
    assert (file.config.dim, file.config.n_heads) == (MODEL.dim, MODEL.n_heads)
    assert file.config.n_refiner_layers == MODEL.n_refiner_layers


@pytest.mark.parametrize("layers", [3, 6, 15])
def test_published_places_follow_from_the_layers(layers: int, tmp_path: Path) -> None:
    """Of the published width; the tensors' bytes are never read."""
    path = tmp_path / "union.safetensors"
    shapes = {"control_all_x_embedder.2-1.weight": [3840, 64]}
    shapes |= {f"control_layers.{index}.attention.norm_q.weight": [128] for index in range(layers)}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    places = open_control_file(path).config.places
    assert len(places) == layers
    assert places == tuple(range(0, 30, 30 // layers))


def test_a_folder_that_diffusers_saved(tmp_path: Path, file_of: Files, net_of: Nets) -> None:
    """Its configuration says what a file cannot, and its tensors are the same."""
    from control_tools import diffusers_controlnet

    diffusers_controlnet(TWO).save_pretrained(tmp_path / "saved")
    found = open_control_file(tmp_path / "saved")
    assert (found.name, found.config.refiner, found.config.places) == ("saved", Refiner.LAYERS, TWO.places)
    assert found.config == open_control_file(file_of(TWO), TWO.places).config
    config = tmp_path / "saved" / "config.json"
    document = json.loads(config.read_text("utf-8"))
    for change, facts in (
        ({"control_layers_places": [0, 1]}, ("[0, 1]", 3)),
        ({"_class_name": "FluxControlNetModel"}, ("FluxControlNetModel",)),
        ({"add_control_noise_refiner": "x"}, ("add_control_noise_refiner", "'x'")),
    ):
        config.write_text(json.dumps(document | change), "utf-8")
        with raises_with(CheckpointError, *facts):
            open_control_file(tmp_path / "saved")


@pytest.fixture(scope="module")
def exact(extended_in: Nets, net_of: Nets) -> Iterator[tuple[Pipeline, Drawing]]:
    """A pipeline in float32, and its image under a ControlNet in float32, which is far from the one without."""
    with Pipeline.from_bundle(extended_in(Precision.FP32), "cpu") as pipeline:
        expected = ours(pipeline, net_of(LITE), CASE)
        assert relative_error(ours(pipeline, None, CASE).latents, expected.latents) > 0.3
        yield pipeline, expected


@pytest.mark.deep
@pytest.mark.parametrize("precision", Precision)
def test_every_precision_is_near_the_file(precision: Precision, net_of: Nets, exact: tuple[Pipeline, Drawing]) -> None:
    net = ControlNet.open(net_of(LITE, precision))
    assert net.manifest.parity is not None
    errors = net.manifest.parity["relative_error"]
    assert set(errors) == {"control_tokens", "control_refiner", "control_layers"}
    assert 0 <= min(errors.values()) <= max(errors.values()) < MOST[precision]
    if precision is not Precision.FP32:
        assert max(errors.values()) > MOST[precision] / 50, "nothing was rounded"
    pipeline, expected = exact
    assert relative_error(ours(pipeline, net.root, CASE).latents, expected.latents) < MOST[precision]


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8])
def test_what_programs_there_are(precision: Precision, net_of: Nets) -> None:
    manifest = ControlNet.open(net_of(LITE, precision)).manifest
    forms = {"cpu", CUDA} | ({CUDA_WEIGHT_ONLY, WEBGPU, WEBGPU_FUSED} if precision is Precision.INT8 else set())
    assert set(manifest.programs[Program.CONTROL_LAYERS]) == forms
    assert set(manifest.programs[Program.CONTROL_MODULATION]) == {"cpu"}
    assert set(manifest.programs) == set(CONTROL_PROGRAMS)
    assert Program.CONTROL_REFINER not in ControlNet.open(net_of(TWO)).manifest.programs


def test_no_program_reads_another_folder(net_of: Nets) -> None:
    net = ControlNet.open(net_of(LITE))
    for records in net.manifest.programs.values():
        for record in records.values():
            model = onnx.load(str(net.root / record.path), load_external_data=False)
            places = {
                entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"
            }
            assert places <= {"weights.safetensors"}


def test_the_fingerprint_is_of_what_decides_hints(net_of: Nets) -> None:
    net = ControlNet.open(net_of(LITE))
    fingerprint = net.manifest.fingerprint
    assert net.with_manifest(parity=None, programs={}).manifest.fingerprint == fingerprint
    assert ControlNet.open(net_of(TWO_ONE)).manifest.fingerprint != fingerprint
    folds = {"control_layers.0": {"attention": 9, "ffn": 0, "product": 0}}
    assert net.with_manifest(folds=folds).manifest.fingerprint != fingerprint


def others(tmp_path: Path) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """Files of other kinds: some tensors of each, and what must be said."""
    return {
        "lora": (
            {"diffusion_model.layers.0.attention.to_q.lora_A.weight": (4, 96)},
            ("LoRA", "--lora", "diffusion_model.layers.0.attention.to_q.lora_A.weight"),
        ),
        "sd15": ({"control_model.input_hint_block.0.weight": (4, 4)}, ("Stable Diffusion",)),
        "sdxl": ({"controlnet_cond_embedding.conv_in.weight": (4, 4)}, ("Stable Diffusion",)),
        "flux": ({"controlnet_blocks.0.weight": (4, 4), "transformer_blocks.0.attn.to_q.weight": (4, 4)}, ("FLUX",)),
        "ip": ({"image_proj.latents": (4, 4)}, ("IP-Adapter",)),
        "model": (
            {"x_pad_token": (1, 96), "cap_pad_token": (1, 96), "cap_embedder.0.weight": (64,)},
            ("Z-Image transformer",),
        ),
        "unet": ({"down_blocks.0.attentions.0.proj_in.weight": (4, 4)}, ("Stable Diffusion UNet",)),
        "nothing": ({"a.weight": (4, 4)}, ("control_all_x_embedder.2-1.weight",)),
    }


@pytest.mark.parametrize("kind", ["lora", "sd15", "sdxl", "flux", "ip", "model", "unet", "nothing"])
def test_files_that_are_no_controlnet(kind: str, tmp_path: Path, capsys: Capture) -> None:
    shapes, facts = others(tmp_path)[kind]
    path, out = tmp_path / f"{kind}.safetensors", tmp_path / "out"
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, path)
    assert_one_line_error(call_export(capsys, "controlnet", path, out, "--quiet"), path, *facts)
    assert not out.exists()


def test_a_controlnet_is_no_model(file_of: Files, tmp_path: Path, checkpoint: Path, capsys: Capture) -> None:
    path = file_of(LITE)
    outcome = call_export(capsys, "build", checkpoint, tmp_path / "out", "--transformer", path, "--quiet")
    assert_one_line_error(outcome, path, "zimage-export controlnet")


def test_damaged_files(file_of: Files, tmp_path: Path, capsys: Capture) -> None:
    tensors, path, out = load_file(file_of(LITE)), tmp_path / "net.safetensors", tmp_path / "out"
    places = ("--places", "0,2", "--quiet")

    def check(changed: dict[str, Any], *facts: object) -> None:
        save_file(changed, path)
        assert_one_line_error(call_export(capsys, "controlnet", path, out, *places), path, *facts)
        assert not out.exists()

    check(
        {n: t for n, t in tensors.items() if n != "control_layers.1.after_proj.weight"}, "control_layers.1.after_proj"
    )
    check({n: t for n, t in tensors.items() if not n.startswith("control_noise_refiner.0.")}, "control_noise_refiner.0")
    check(tensors | {"control_layers.1.after_proj.weight": np.ones((96, 97), np.float32)}, "[96, 97]")
    check(tensors | {"control_all_x_embedder.2-1.weight": np.ones((96, 80), np.float32)}, "[96, 80]", 16, 33)
    save_file(tensors, path)
    os.truncate(path, path.stat().st_size - 100)
    assert_one_line_error(call_export(capsys, "controlnet", path, out, *places), path, "truncated")
    assert_one_line_error(call_export(capsys, "controlnet", tmp_path / "none.safetensors", out), "none.safetensors")
    assert_one_line_error(call_export(capsys, "controlnet", tmp_path, out), tmp_path, "safetensors")


def test_places_that_cannot_be(file_of: Files, tmp_path: Path) -> None:
    with raises_with(CheckpointError, file_of(LITE), 2, "--places"):
        open_control_file(file_of(LITE))
    for places in ((0,), (1, 2), (2, 0), (0, 0), (0, 1, 2)):
        with raises_with(CheckpointError, file_of(LITE), 2):
            open_control_file(file_of(LITE), places)


@pytest.mark.deep
def test_an_export_is_all_or_nothing_and_replaces_only_its_kind(
    file_of: Files, net_of: Nets, tmp_path: Path, capsys: Capture
) -> None:
    out, words = tmp_path / "net", ("controlnet", file_of(LITE), tmp_path / "net", "--places", "0,2", "--quiet")
    report = json.loads(call_export(capsys, *words, "--precision", "fp16", "--json").out)
    assert (report["version"], report["precision"], report["parity"]) == ("2.1-lite", "fp16", None)
    assert report["fingerprint"] == ControlNet.open(out).manifest.fingerprint
    assert_one_line_error(call_export(capsys, *words), out, "--force")
    assert call_export(capsys, *words, "--force").lines == [str(out)]
    assert ControlNet.open(out).manifest.precision is Precision.FP32
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").touch()
    with pytest.raises(ExportError):
        export(file_of(LITE), other, LITE)
    assert (other / "letter.txt").exists()


def test_zeros_that_are_not_a_refiner_of_version_two(tmp_path: Path) -> None:
    """One projection that is zero everywhere is enough, whichever."""
    for name in ("before_proj", "after_proj"):
        tensors = random_tensors(TWO_ONE)
        tensors[f"control_noise_refiner.0.{name}.weight"] *= 0
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        assert open_control_file(path, TWO_ONE.places).config.version == "2.0"


@pytest.mark.parametrize("name", CONTROL_SETS)
def test_layers_of_every_precision_have_what_their_executor_needs(name: str) -> None:
    """A dataclass takes the defaults of its first base, which for integers is the CPU's."""
    programs = PROGRAM_SETS[name]
    made = [
        programs.layers(
            GraphBuilder(Program.CONTROL_LAYERS, name, {}, lambda n, s: DType.F32), StoragePolicy(precision)
        )
        for precision in programs.precisions
    ]
    assert {layers.hints for layers in made} == {DType.BF16 if programs.executor == CUDA else DType.F32}
    assert {layers.position_blocks for layers in made} == {1 if programs.executor == "cpu" else POSITION_BLOCKS}


@pytest.mark.deep
def test_info_describes_and_verifies(net_of: Nets, tmp_path: Path, capsys: Capture) -> None:
    net = net_of(LITE)
    document = json.loads(call_rt(capsys, "info", net, "--verify", "--json").out)
    assert (document["config"]["version"], document["config"]["places"]) == ("2.1-lite", list(LITE.places))
    assert document["verified"] is True
    assert document["parity"] == ControlNet.open(net).manifest.parity
    lines = call_rt(capsys, "info", net).lines
    assert any("2.1-lite" in line and "inpaint" in line for line in lines)
    copy = Path(shutil.copytree(net, tmp_path / "net"))
    with (copy / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    outcome = call_rt(capsys, "info", copy, "--verify")
    assert outcome.status == 1
    assert "weights.safetensors" in outcome.err
