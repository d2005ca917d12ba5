"""`run --executor tensorrt` from the command line, on the stand-in device: what is said, and what is generated."""

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cli_tools import Capture, call_rt
from device_stand_in import StandInDevice
from facts import assert_facts, raises_with
from gpu_stand_in import Card, install_gpus
from library_stand_in import LibraryStandIn
from onnx_engines import OnnxEngines, twins
from PIL import Image

from zimage_export.engines import build as export_engines
from zimage_export.engines.block_graphs import BlockProgram
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import ExecutorError
from zimage_runtime.events import ImageEvent, StepEvent
from zimage_runtime.executors.examination import Verdict
from zimage_runtime.executors.protocol import Options
from zimage_runtime.executors.tensorrt import engine_store as store
from zimage_runtime.executors.tensorrt import kind, trt_api
from zimage_runtime.executors.tensorrt.engine_store import read_catalog
from zimage_runtime.machine.gpu_targets import Variant
from zimage_runtime.model.blocks import BlockKind, all_blocks, encoder_blocks
from zimage_runtime.pipeline import Pipeline, Request

DRAW = ("--size", "32x32", "--steps", 1, "--seed", 1)


@pytest.fixture(scope="module")
def engined(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of an earlier TensorRT; its block programs are the float32 twins. Not to be written to."""
    target = tmp_path_factory.mktemp("engined") / "bundle"
    shutil.copytree(bundle, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_engines, "Library", LibraryStandIn)
        patch.setattr(export_engines, "bundle_blocks", lambda opened, variant, lora: twins(opened))
        export_engines.add_engines(Bundle.open(target))
    return target


@pytest.fixture(scope="module")
def programs(engined: Path) -> list[BlockProgram]:
    return twins(Bundle.open(engined))


class RunningLibrary(LibraryStandIn):
    """A later TensorRT, whose engines run their programs on the stand-in device."""

    version = "1.8.0"

    def __init__(self, engines: OnnxEngines) -> None:
        super().__init__()
        self.engines = engines

    def context(self, engine: bytes, shapes: Any, stream: int) -> Any:
        return self.engines.context(engine.decode().split()[0], shapes, stream)


@pytest.fixture
def later(
    engined: Path, programs: list[BlockProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunningLibrary:
    """A machine with a GPU and that library."""
    opened = Bundle.open(engined)
    device = StandInDevice(limit=1 << 30, capability=(8, 9))
    made = RunningLibrary(OnnxEngines(device, programs, read_catalog(opened).variants[Variant.AMPERE]))
    install_gpus(monkeypatch, Card())
    monkeypatch.setattr(kind, "CudaDevice", lambda index: device)
    monkeypatch.setattr(kind, "library_for", lambda capability: made)
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


def kernels(later: RunningLibrary, tmp_path: Path) -> Path:
    """The file of compiled kernels in the user's cache."""
    (found,) = (tmp_path / "cache").glob("kernels-*")
    assert found.read_bytes().endswith(later.compiled)
    assert found.stat().st_mode & 0o777 == 0o600
    return found


def test_compiled_kernels_are_kept_and_not_written_again(
    engined: Path, later: RunningLibrary, tmp_path: Path, capsys: Capture
) -> None:
    def run(name: str) -> None:
        options = ("-m", engined, *DRAW, "--executor", "tensorrt", "-o", tmp_path / name)
        assert call_rt(capsys, "run", "a fox", *options).status == 0

    run("first.png")
    assert later.kernels is None, "there were none before"
    written = kernels(later, tmp_path).stat().st_ino  # each writing is another file
    run("second.png")
    assert later.kernels == later.compiled
    assert kernels(later, tmp_path).stat().st_ino == written


@pytest.mark.parametrize("event", [StepEvent, ImageEvent])
def test_a_run_that_is_interrupted_has_not_compiled_for_nothing(
    engined: Path, later: RunningLibrary, tmp_path: Path, event: type[object]
) -> None:
    """After the first step the kernels so far are there, after the image the decoder's too; nothing was closed."""
    pipeline = Pipeline.from_bundle(engined, "tensorrt")
    events = pipeline.stream("a fox", size=(32, 32), steps=2, seed=1)
    later.compiled = b"those of the text encoder and of a step"
    for found in events:
        if isinstance(found, StepEvent) and found.step == 1:
            kernels(later, tmp_path)
            if event is ImageEvent:
                later.compiled = b"the decoder's too"
        if isinstance(found, event):
            break
    kernels(later, tmp_path)
    events.close()  # type: ignore[attr-defined]
    pipeline.close()


def test_engines_of_a_bundle_are_loaded_if_the_user_trusts_them(
    engined: Path, later: RunningLibrary, tmp_path: Path, capsys: Capture
) -> None:
    later.version = "1.7.1.116"  # that of the bundle's engines
    options = ("-m", engined, *DRAW, "--executor", "tensorrt")
    trusted = call_rt(capsys, "run", "a fox", *options, "--trust-engines", "-o", tmp_path / "trusted.png")
    assert trusted.status == 0, trusted.err
    assert later.built == []
    files = {path.read_bytes() for path in (engined / "engines").glob("*.engine")}
    assert later.loaded
    assert set(later.loaded) <= files
    plain = call_rt(capsys, "run", "a fox", *options, "-o", tmp_path / "plain.png")
    assert plain.status == 0, plain.err
    assert "transformer_block" in later.built


def test_an_engine_that_cannot_be_loaded_is_no_end_of_auto(
    engined: Path, later: RunningLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next executor is chosen before anything is generated, and a warning says why."""
    monkeypatch.setattr(later, "load", lambda data: None)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    job = Pipeline.from_bundle(engined).prepare(Request("a fox", size=(32, 32), steps=1))
    assert job.executor.name == "cuda"
    (notice,) = [notice for notice in job.notices if "tensorrt" in notice.text]
    assert notice.warning
    assert_facts(notice.text, "cuda", "transformer_block", "because")
    with raises_with(ExecutorError, "tensorrt_rtx", "transformer_block", "because"):
        Pipeline.from_bundle(engined, "tensorrt")


def test_a_gpu_that_tensorrt_does_not_serve_is_left_to_cuda(
    engined: Path, later: RunningLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "library_for", trt_api.library_for)
    monkeypatch.setattr(trt_api, "import_module", only_rtx)
    monkeypatch.setattr(kind, "CudaDevice", lambda index=0: StandInDevice(capability=(9, 0)))
    unavailable = kind.why_unavailable(Bundle.open(engined), 0)
    assert unavailable is not None
    assert_facts(unavailable.reason, "9.0", "--executor cuda")
    found = kind.examine()
    assert found.verdict is Verdict.NOTE
    assert_facts(found.text, "9.0", "--executor cuda")


def only_rtx(name: str) -> ModuleType:
    if name != "tensorrt_rtx":
        raise ImportError(name)
    return pytest.importorskip(name)  # type: ignore[no-any-return]


def test_without_a_budget_some_memory_is_left_to_others(
    engined: Path, later: RunningLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To kernels that are compiled, graphs and the desktop: 512 MiB, or 5 % of a large card."""
    for total, left in ((8 << 30, 512 << 20), (24 << 30, (24 << 30) // 20)):
        device = StandInDevice(limit=total, capability=(8, 9))
        monkeypatch.setattr(kind, "CudaDevice", lambda index, device=device: device)
        opened = Bundle.open(engined)
        assert kind.open_executor(opened, Options()).vram == total - left
        assert kind.open_executor(opened, Options(vram=total - 1)).vram == total - 1, "what is given is taken"


def test_a_quiet_run_says_nothing(engined: Path, later: RunningLibrary, tmp_path: Path, capsys: Capture) -> None:
    options = ("-m", engined, *DRAW, "--executor", "tensorrt", "--quiet", "-o", tmp_path / "image.png")
    outcome = call_rt(capsys, "run", "a fox", *options)
    assert (outcome.status, outcome.err) == (0, "")
    assert later.built
