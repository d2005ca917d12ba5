"""What `zimage-rt bench --checkpoint` takes: what MODEL of `zimage-export build` is."""

import shutil
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
from zimage_rt.bench.systems.comfyui_files import FILES, convert
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
        original = open_checkpoint(NAME, QUIET, tmp_path / "layout")
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


@pytest.fixture
def models_folder(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint as a ComfyUI `models` folder, the transformer quantized to fp8."""
    import torch
    from safetensors.torch import load_file, save_file

    files, folder = convert(checkpoint, tmp_path / "files"), tmp_path / "models"
    for part, room in (("text_encoder", "text_encoders"), ("vae", "vae")):
        (folder / room).mkdir(parents=True)
        (files / FILES[part]).rename(folder / room / FILES[part])
    (folder / "diffusion_models").mkdir()
    tensors = load_file(files / FILES["transformer"])
    for name in [name for name in tensors if name.endswith("feed_forward.w2.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "diffusion_models" / "z_image_turbo.safetensors")
    shutil.copy(checkpoint / "tokenizer" / "tokenizer.json", folder)
    for part in ("transformer", "text_encoder", "vae", "scheduler"):  # sizes that weights alone do not show
        shutil.copytree(
            checkpoint / part, folder / part, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True
        )
    return folder


@pytest.mark.deep
def test_a_comfyui_folder_is_written_in_the_layout_that_baselines_read(
    models_folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """diffusers' own loader reads it: the same weights, and what was quantized as it was rounded."""
    from diffusers import ZImagePipeline

    layout = tmp_path / "out" / "layout"
    original = open_checkpoint(models_folder, QUIET, layout)
    assert (original.root, original.name) == (layout, "z_image_turbo")
    found, published = (ZImagePipeline.from_pretrained(str(root)) for root in (layout, checkpoint))
    rounded = 0
    for part in ("transformer", "text_encoder", "vae"):
        ours, theirs = getattr(found, part).state_dict(), getattr(published, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            same = bool((ours[name].float() == value.float()).all())
            rounded += not same
            assert same or name.endswith("feed_forward.w2.weight"), name
            assert float((ours[name].float() - value.float()).abs().max()) < 0.1
    assert rounded > 0
    prompt = published.tokenizer("a red fox")["input_ids"]
    assert found.tokenizer("a red fox")["input_ids"] == prompt
    made = (layout / "made_from").stat().st_mtime_ns
    assert open_checkpoint(models_folder, QUIET, layout) == original
    assert (layout / "made_from").stat().st_mtime_ns == made, "it is written once"


def test_weights_are_counted_in_float32(checkpoint: Path) -> None:
    import torch
    from safetensors import safe_open

    elements = 0
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            elements += sum(torch.numel(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    assert open_checkpoint(checkpoint, QUIET, Path("none")).float32_bytes == 4 * elements


def test_a_checkpoint_of_another_model_is_refused(bundle: Path) -> None:
    settings = Settings(((48, 32),), ("cpu",), 1, "a", 7, 1, 1, checkpoint=open_checkpoint("tiny", QUIET, Path("none")))
    with raises_with(RequestError, bundle.name, "tiny"):
        plan_cases(settings, open_bundles([str(bundle)]), 1)


def test_without_diffusers_the_reason_is_what_to_install(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage_rt.bench.systems.diffusers_pipeline.find_spec", lambda name: None)
    settings = Settings(
        ((48, 32),), ("cpu",), 1, "a", 7, 1, 1, checkpoint=open_checkpoint(checkpoint, QUIET, Path("none"))
    )
    (opened,) = open_bundles([str(bundle)])
    manifest = replace(opened.bundle.manifest, precision=Precision.BF16)  # an fp32 bundle would be the reference
    (planned,) = plan_cases(settings, [replace(opened, bundle=Bundle(opened.path, manifest))], 1)
    assert isinstance(planned.reference, str)
    assert "zimage-rt[export]" in planned.reference
