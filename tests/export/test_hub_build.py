"""Checkpoints by their name on the Hub: what is fetched, what the manifest says of it, and what goes wrong."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Capture, assert_one_line_error, call_export
from hub_server import COMMIT, SECOND_COMMIT, HubServer, hub_in_use

from zimage_export.source.checkpoint import Checkpoint
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.hub import Hub
from zimage_runtime.command_line.progress import Progress

NAME = "painters/z-image-tiny"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path) -> Iterator[HubServer]:
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        server.add(NAME, {**_files(checkpoint), **_unwanted(checkpoint)})
        yield server


def _files(checkpoint: Path) -> dict[str, bytes]:
    return {p.relative_to(checkpoint).as_posix(): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


def _unwanted(checkpoint: Path) -> dict[str, bytes]:
    """What else a published repository has: other formats, variants, images."""
    names = [
        "README.md",
        "assets/showcase.jpg",
        "text_encoder/pytorch_model.bin",
        "text_encoder/generation_config.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors.index.json",
        "transformer/diffusion_pytorch_model-00004-of-00004.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    return {name: f"not wanted: {name}".encode() for name in names}


def test_a_bundle_from_the_hub_is_that_from_a_directory_and_names_its_commit(
    hub: HubServer, checkpoint: Path, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    outcome = call_export(capsys, "build", NAME, out, "--quiet")
    assert (outcome.status, outcome.out, outcome.err) == (0, f"{out}\n", "")
    assert sorted(hub.fetched()) == sorted(_files(checkpoint))
    built, expected = Bundle.open(out).manifest, Bundle.open(bundle).manifest
    assert (built.source.name, built.source.revision) == (NAME, COMMIT)
    assert built.fingerprint == expected.fingerprint
    assert (expected.source.name, expected.source.revision) == (checkpoint.name, None)


def test_a_revision_is_recorded_as_commit(hub: HubServer, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    hub.add(NAME, {**_files(checkpoint), "model_index.json": b"{}"}, SECOND_COMMIT, branch="main")
    hub.models[NAME].branches["v1"] = COMMIT
    out = tmp_path / "out"
    assert_one_line_error(call_export(capsys, "build", NAME, out, "--quiet"), "model_index.json")
    assert call_export(capsys, "build", NAME, out, "--quiet", "--revision", "v1").status == 0
    assert Bundle.open(out).manifest.source.revision == COMMIT
    outcome = call_export(capsys, "build", NAME, tmp_path / "none", "--quiet", "--revision", "v2")
    assert_one_line_error(outcome, NAME, "revision", "'v2'")


def test_a_shard_that_broke_off_is_continued_by_the_next_run(hub: HubServer, tmp_path: Path, capsys: Capture) -> None:
    hub.break_after[SHARD] = [1 << 20, *[0] * 20]
    out = tmp_path / "out"
    assert_one_line_error(call_export(capsys, "build", NAME, out, "--quiet"), NAME, "connection", "Hub", "again")
    assert not out.exists()
    hub.break_after.clear()
    done = set(hub.fetched()) - {SHARD}
    hub.log.clear()
    assert call_export(capsys, "build", NAME, out, "--quiet").status == 0
    assert [asked.first_byte for asked in hub.log if asked.method == "GET" and asked.file == SHARD] == [1 << 20]
    assert not done & set(hub.fetched())


def test_nothing_is_fetched_for_an_output_that_is_in_the_way(hub: HubServer, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out").mkdir()
    assert_one_line_error(call_export(capsys, "build", NAME, tmp_path / "out"), tmp_path / "out", "--force")
    assert hub.log == []


def test_a_directory_has_no_revision(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    outcome = call_export(capsys, "build", checkpoint, tmp_path / "out", "--revision", "main")
    assert_one_line_error(outcome, checkpoint, "--revision", "Hub")


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "./painters/z-image-tiny", "painters\\z-image-tiny"])
def test_what_is_no_name_is_a_directory_that_is_missing(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(call_export(capsys, "build", model, "out"), Path(model), "directory", "diffusers")
    assert hub.log == []


def test_a_model_that_does_not_exist_and_one_that_is_no_checkpoint(
    hub: HubServer, tmp_path: Path, capsys: Capture
) -> None:
    hub.add("painters/words", {"config.json": b"{}"})
    outcome = call_export(capsys, "build", "painters/nothing", tmp_path / "out")
    assert_one_line_error(outcome, "painters/nothing", "directory", "Hub", "`hf auth login`")
    outcome = call_export(capsys, "build", "painters/words", tmp_path / "out")
    assert_one_line_error(outcome, "painters/words", "diffusers", "model_index.json")


def test_weights_in_another_format_are_said_to_be_of_no_use(
    hub: HubServer, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    files = {name: data for name, data in _files(checkpoint).items() if not name.startswith("vae/diffusion")}
    hub.add("painters/pickled", {**files, "vae/diffusion_pytorch_model.bin": b"0"})
    outcome = call_export(capsys, "build", "painters/pickled", tmp_path / "out", "--quiet")
    assert_one_line_error(outcome, "painters/pickled", "vae", "safetensors")
    assert not [name for name in hub.fetched() if name.endswith((".bin", ".safetensors"))]


def test_a_component_from_a_file_is_not_fetched(
    hub: HubServer, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "my-vae.safetensors"
    shutil.copyfile(checkpoint / "vae" / "diffusion_pytorch_model.safetensors", file)
    assert call_export(capsys, "build", NAME, tmp_path / "out", "--vae", file, "--quiet").status == 0
    assert [name for name in hub.fetched() if name.startswith("vae/")] == ["vae/config.json"]
    assert Bundle.open(tmp_path / "out").manifest.source.name == NAME


@pytest.mark.deep
def test_verify_compares_with_the_commit_that_the_bundle_was_made_from(
    hub: HubServer, checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zimage_export.measure.verify import VerifyReport

    out = tmp_path / "out"
    assert call_export(capsys, "build", NAME, out, "--quiet").status == 0
    hub.add(NAME, {**_files(checkpoint), "model_index.json": b"{}"}, SECOND_COMMIT)
    references = []

    def record(bundle: Bundle, model: str, *rest: Any) -> Any:
        references.append(model)
        return VerifyReport(bundle, {})

    monkeypatch.setattr("zimage_export.measure.verify.verify_reported", record)
    monkeypatch.setattr("zimage_export.measure.parity.parity_table", lambda parity: "")
    assert call_export(capsys, "verify", out, "--reference", NAME, "--quiet").status == 0
    assert [Path(path).name for path in references] == [COMMIT]


def test_a_checkpoint_in_the_cache_can_be_opened_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    fetched = Hub(Progress(quiet=True)).checkpoint(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    snapshot = Hub(Progress(quiet=True)).checkpoint(NAME)
    assert snapshot == fetched
    assert Checkpoint.open(snapshot.path).config == Checkpoint.open(fetched.path).config
    assert hub.log == []
