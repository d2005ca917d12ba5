"""`run --executor tensorrt` from the command line, on the stand-in device: what is said, and what is generated."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, call_rt
from device_stand_in import StandInDevice
from facts import assert_facts
from gpu_stand_in import Card, install_gpus
from library_stand_in import LibraryStandIn
from onnx_engines import OnnxEngines, twins
from PIL import Image

from zimage_export.engines import build as export_engines
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.executors.tensorrt import engine_store as store
from zimage_runtime.executors.tensorrt import kind
from zimage_runtime.executors.tensorrt.engine_store import read_catalog
from zimage_runtime.machine.gpu_targets import Variant
from zimage_runtime.model.blocks import BlockKind, all_blocks, encoder_blocks

DRAW = ("--size", "32x32", "--steps", 1, "--seed", 1)


@pytest.fixture
def engined(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with engines of an earlier TensorRT; its block programs are the float32 twins."""
    target = tmp_path / "bundle"
    shutil.copytree(bundle, target)
    monkeypatch.setattr(export_engines, "Library", LibraryStandIn)
    monkeypatch.setattr(export_engines, "bundle_blocks", lambda opened, variant: twins(opened))
    export_engines.add_engines(Bundle.open(target))
    return target


class RunningLibrary(LibraryStandIn):
    """A later TensorRT, whose engines run their programs on the stand-in device."""

    version = "1.8.0"

    def __init__(self, engines: OnnxEngines) -> None:
        super().__init__()
        self.engines = engines

    def context(self, engine: bytes) -> Any:
        return self.engines.context(engine.decode().split()[0])


@pytest.fixture
def later(engined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunningLibrary:
    """A machine with a GPU and that library."""
    opened = Bundle.open(engined)
    device = StandInDevice(limit=1 << 30, capability=(8, 9))
    made = RunningLibrary(OnnxEngines(device, twins(opened), read_catalog(opened).variants[Variant.AMPERE]))
    install_gpus(monkeypatch, Card())
    monkeypatch.setattr(kind, "CudaDevice", lambda index: device)
    monkeypatch.setattr(kind, "Library", lambda: made)
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path / "cache")
    return made


def test_engines_that_are_built_here_are_said_once(
    engined: Path, later: RunningLibrary, tmp_path: Path, capsys: Capture
) -> None:
    image, again, expected = (tmp_path / f"{name}.png" for name in ("first", "second", "cpu"))
    first = call_rt(capsys, "run", "a fox", "-m", engined, *DRAW, "--executor", "tensorrt", "-o", image)
    assert first.status == 0, first.err
    assert first.lines == [str(image)], "notes go to stderr"
    notes = [line for line in first.err.splitlines() if "engine" in line]
    for note, name in zip(notes, later.built, strict=True):
        assert_facts(note, name, "tensorrt_rtx 1.8.0")
    blocks = read_catalog(Bundle.open(engined)).variants[Variant.AMPERE].blocks
    config = Bundle.open(engined).manifest.config
    encoding = {blocks[place.key].program for place in encoder_blocks(config)}
    others = [p for p in all_blocks(config) if p not in encoder_blocks(config) and p.kind is not BlockKind.DECODER_TILE]
    generating = {blocks[place.key].program for place in others}  # the decoder fits, and needs no tiles
    assert generating <= set(later.built) <= generating | encoding, "each that an image takes, and no other"
    assert len(later.built) == len(set(later.built))

    second = call_rt(capsys, "run", "a fox", "-m", engined, *DRAW, "--executor", "tensorrt", "-o", again)
    assert "engine" not in second.err, "the user's cache has them"
    assert call_rt(capsys, "run", "a fox", "-m", engined, *DRAW, "--executor", "cpu", "-o", expected).status == 0
    for generated in (image, again):
        difference = np.asarray(Image.open(generated), np.int16) - np.asarray(Image.open(expected), np.int16)
        assert np.abs(difference).max() <= 1


def test_a_quiet_run_says_nothing(engined: Path, later: RunningLibrary, tmp_path: Path, capsys: Capture) -> None:
    options = ("-m", engined, *DRAW, "--executor", "tensorrt", "--quiet", "-o", tmp_path / "image.png")
    outcome = call_rt(capsys, "run", "a fox", *options)
    assert (outcome.status, outcome.err) == (0, "")
    assert later.built
