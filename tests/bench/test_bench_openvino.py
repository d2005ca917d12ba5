"""OpenVINO GenAI as a system: its environment, the exporter's command, and a pipeline that calls back as the real."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from facts import assert_facts, raises_with

from zimage_export.synthetic.checkpoint import SMALL
from zimage_rt.bench.job import WorkerJob
from zimage_rt.bench.schema import Case
from zimage_rt.bench.systems import find_system, openvino_environment
from zimage_rt.bench.systems.openvino_genai import OpenVinoExportError
from zimage_runtime.model.noise import TorchGenerator

NAMES = {"openvino-genai": "fp32", "openvino-genai-int8": "int8"}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose exporter writes what it was asked into the folder that it should write."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", "/of/this/process")
    folder = openvino_environment.environment_folder()
    program = openvino_environment.script(folder, "optimum-cli")
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\nfor out; do :; done\ncase "$*" in *bad*) echo no such model >&2; exit 3;; esac\n'
        'mkdir -p "$out" && echo "$@ ${PYTHONPATH-none}" >> "$out/asked"\n'
    )
    program.chmod(0o755)
    (folder / "complete").touch()
    return folder


class Pipeline:
    """Calls back as the real one does: noise once the prompt is encoded, then each step."""

    asked: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: str, device: str, **settings: Any) -> None:
        Pipeline.asked = {"model": model, "device": device, **settings}

    def generate(self, prompt: str, generator: Any, callback: Any, **options: Any) -> Any:
        Pipeline.asked |= {"prompt": prompt, **options}
        latents = generator.randn_tensor([1, 16, options["height"] // 8, options["width"] // 8])
        for step in range(options["num_inference_steps"]):
            assert callback(step, options["num_inference_steps"], latents) is False
        data = np.zeros((1, options["height"], options["width"], 3), np.uint8)
        data[0, 0, 0] = np.abs(latents.ravel()[:3] * 50)
        return type("Tensor", (), {"data": data})()


@pytest.fixture
def libraries(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genai, openvino = ModuleType("openvino_genai"), ModuleType("openvino")
    vars(genai).update(Generator=type("Generator", (), {}), Text2ImagePipeline=Pipeline)
    vars(openvino).update(Tensor=np.asarray)
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setattr(sys, "path", list(sys.path))


def job(system: str) -> WorkerJob:
    case = Case(system, "m", "fp32", "f", system, 64, 32, 3, 7, "a red fox", 1, 1, threads=2)
    return WorkerJob(case, "/model", "/picture")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for the exporter is a shell script")
@pytest.mark.parametrize("name", NAMES)
def test_the_exporter_runs_in_its_own_environment_and_once(environment: Path, tmp_path: Path, name: str) -> None:
    system = find_system(name)
    assert system.obstacle(SMALL.config) is None
    out = system.convert(tmp_path / "checkpoint", tmp_path / "work")
    assert system.convert(tmp_path / "checkpoint", tmp_path / "work") == out
    (asked,) = (out / "asked").read_text().splitlines()
    assert_facts(asked, str(tmp_path / "checkpoint"), "text-to-image", NAMES[name], "none")
    assert system.precision == NAMES[name]
    with raises_with(OpenVinoExportError, "bad", "no such model"):
        system.convert(tmp_path / "bad", tmp_path / "other")


def test_without_its_environment_the_reason_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reason = find_system("openvino-genai").obstacle(SMALL.config)
    assert reason is not None
    assert_facts(reason, openvino_environment.__name__)


def test_making_it_installs_the_packages_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(openvino_environment.subprocess, "run", lambda words, check: ran.append(words))
    tmp_path.mkdir(exist_ok=True)
    openvino_environment.make(tmp_path)
    assert openvino_environment.is_made(tmp_path)
    assert "openvino-telemetry" in next(words for words in ran if "uninstall" in words)
    installs = [words for words in ran if "install" in words]
    assert [set(openvino_environment.PACKAGES) <= set(words) for words in installs] == [True]
    assert installs[0][0] == str(openvino_environment.script(tmp_path, "python"))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", NAMES)
def test_it_generates_from_torchs_noise_and_marks_each_stage(environment: Path, name: str) -> None:
    system, marks = find_system(name), []
    system.prepare()
    assert str(openvino_environment.site_packages(environment)) in sys.path
    model = system.load(job(name))
    image = model.generate(lambda stage, ended=None: marks.append(stage))
    assert marks == ["text", "step", "step", "step", "decode"]
    expected = np.abs(TorchGenerator(7).normals((1, 16, 4, 8)).ravel()[:3] * 50).astype(np.uint8)
    assert tuple(image.getpixel((0, 0))) == tuple(expected)
    asked = Pipeline.asked
    assert (asked["width"], asked["height"], asked["num_inference_steps"], asked["guidance_scale"]) == (64, 32, 3, 0.0)
    assert (asked["device"], asked["INFERENCE_NUM_THREADS"]) == ("CPU", 2)
    assert asked.get("INFERENCE_PRECISION_HINT") == ("f32" if NAMES[name] == "fp32" else None)
    assert model.on_gpu() is False
    assert_facts(model.notes()[0], "512 tokens")
