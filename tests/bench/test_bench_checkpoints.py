"""What `zimage-rt bench --checkpoint` takes: a directory, a name on the Hub, or `tiny`, as `zimage-export build`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_tools import call_redirected
from facts import raises_with
from hub_server import COMMIT, hub_in_use

from zimage_export.source.checkpoint import DEMO, Checkpoint
from zimage_rt.bench import run as runs
from zimage_rt.bench.checkpoints import open_checkpoint
from zimage_rt.bench.job import WorkerJob
from zimage_rt.bench.jobs import Planned, Settings, open_bundles, plan_cases
from zimage_rt.bench.systems import find_system
from zimage_rt.cli import cli
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import RequestError

NAME = "painters/z-image-small"
QUIET = Progress(quiet=True)


def test_tiny_is_the_demo_checkpoint_wherever_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[WorkerJob] = []

    def interrupt(job: WorkerJob, *_: Any, **__: Any) -> Any:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "watch", interrupt)
    outcome = call_redirected(cli, "bench", "--checkpoint", "tiny", "--quiet", "--size", "64x64")
    assert outcome.status == 130, outcome.err
    (reference,) = jobs
    assert (reference.case.system, reference.case.model) == ("diffusers", "tiny")
    assert Path(reference.model).samefile(DEMO)


@pytest.mark.deep
def test_a_name_on_the_hub_is_fetched_and_gives_results_their_name(
    bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        server.add(NAME, checkpoint)
        original = open_checkpoint(NAME, QUIET)
    assert (original.name, original.root.name) == ("z-image-small", COMMIT)
    assert original.config == Checkpoint.open(checkpoint).config
    settings = Settings(((48, 32),), ("cpu",), 1, "a", 7, 1, 1, checkpoint=original, baselines=("diffusers",))
    _, baseline = plan_cases(settings, open_bundles([str(bundle)]), 1)
    assert (baseline.case.model, baseline.model) == ("z-image-small", original.root)
    assert isinstance(baseline.reference, Planned)
    picture = tmp_path / "x.png"
    model = find_system("diffusers").load(WorkerJob(baseline.case, str(baseline.model), str(picture)))
    assert model.generate(lambda stage, ended=None: None).size == (48, 32)


def test_a_bundle_from_the_hub_keeps_its_name(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        server.add("painters/small-fp32", bundle)
        (opened,) = open_bundles(["painters/small-fp32"], QUIET)
    assert (opened.name, opened.path.name) == ("small-fp32", COMMIT)


def test_weights_are_counted_in_float32(checkpoint: Path) -> None:
    import torch
    from safetensors import safe_open

    elements = 0
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            elements += sum(torch.numel(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    assert open_checkpoint(checkpoint, QUIET).float32_bytes == 4 * elements


def test_a_checkpoint_of_another_model_is_refused(bundle: Path) -> None:
    settings = Settings(((48, 32),), ("cpu",), 1, "a", 7, 1, 1, checkpoint=open_checkpoint("tiny", QUIET))
    with raises_with(RequestError, bundle.name, "tiny"):
        plan_cases(settings, open_bundles([str(bundle)]), 1)


def test_without_diffusers_the_reason_is_what_to_install(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage_rt.bench.systems.diffusers_pipeline.find_spec", lambda name: None)
    settings = Settings(((48, 32),), ("cpu",), 1, "a", 7, 1, 1, checkpoint=open_checkpoint(checkpoint, QUIET))
    (opened,) = open_bundles([str(bundle)])
    manifest = replace(opened.bundle.manifest, precision=Precision.BF16)  # an fp32 bundle would be the reference
    (planned,) = plan_cases(settings, [replace(opened, bundle=Bundle(opened.path, manifest))], 1)
    assert isinstance(planned.reference, str)
    assert "zimage-rt[export]" in planned.reference
