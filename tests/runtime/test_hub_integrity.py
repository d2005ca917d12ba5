"""Downloads from the Hub arrive whole: hashed on every way that they take, and never mixed with another's."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_tools import finish, start
from facts import raises_with
from hub_server import COMMIT, HubServer, hub_in_use

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.hub import Hub, bundle_directory
from zimage_runtime.bundle.hub_errors import HubError
from zimage_runtime.command_line.progress import Progress

NAME = "painters/z-image-tiny-fp32"
WEIGHTS = "transformer/weights.safetensors"
QUIET = Progress(quiet=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path) -> Iterator[HubServer]:
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        server.add(NAME, bundle)
        yield server


def check_bundle(path: Path) -> None:
    Bundle.open(path).verify()


class StandInForXet:
    """Takes the place of hf_xet, which needs a storage service; counts what it is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.hashes: list[str] = []

    def __call__(self, *, incomplete_path: Path, xet_file_data: Any, expected_size: int, **rest: Any) -> None:
        assert expected_size == len(self.data)
        self.hashes.append(xet_file_data.file_hash)
        incomplete_path.write_bytes(self.data)


@pytest.fixture
def xet(hub: HubServer, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> StandInForXet:
    stand_in = StandInForXet((bundle / WEIGHTS).read_bytes())
    monkeypatch.setattr("huggingface_hub.file_download.is_xet_available", lambda: True)
    monkeypatch.setattr("huggingface_hub.file_download.xet_get", stand_in)
    hub.xet.add(WEIGHTS)
    return stand_in


def test_xet_is_used_where_the_server_offers_it(hub: HubServer, xet: StandInForXet, bundle: Path) -> None:
    check_bundle(bundle_directory(NAME, QUIET))
    assert xet.hashes == [hashlib.sha256(b"xet" + (bundle / WEIGHTS).read_bytes()).hexdigest()]
    assert WEIGHTS not in hub.fetched()
    assert "vae/weights.safetensors" in hub.fetched(), "which is not offered through Xet"


def test_without_hf_xet_what_is_offered_through_it_is_continued_over_http(
    hub: HubServer, xet: StandInForXet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.is_xet_available", lambda: False)
    hub.break_after[WEIGHTS] = [1 << 20, *[0] * 20]
    with pytest.raises(HubError):
        bundle_directory(NAME, QUIET)
    hub.break_after.clear()
    hub.log.clear()
    check_bundle(bundle_directory(NAME, QUIET))
    assert [asked.first_byte for asked in hub.log if asked.file == WEIGHTS and asked.method == "GET"] == [1 << 20]
    assert xet.hashes == []


def test_what_xet_delivers_is_hashed_and_not_kept_when_it_is_wrong(
    hub: HubServer, xet: StandInForXet, tmp_path: Path
) -> None:
    """Neither under its name nor where huggingface_hub shares files between models, or every run would find it."""
    whole = xet.data
    xet.data = whole[:-1] + bytes([whole[-1] ^ 1])
    with raises_with(HubError, NAME, WEIGHTS, "damaged", "again"):
        bundle_directory(NAME, QUIET)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size == len(whole)]
    xet.data = whole
    check_bundle(bundle_directory(NAME, QUIET))
    assert len(xet.hashes) == 2


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize("file", [WEIGHTS, "vae/decoder.cpu.onnx", "tokenizer.json"])
def test_a_download_in_one_go_is_hashed_too(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, links: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: links)
    hub.damaged.append(file)
    with raises_with(HubError, NAME, file, "damaged", "again"):
        bundle_directory(NAME, QUIET)
    assert hub.damaged == []
    assert not list((tmp_path / "cache").glob(f"models--*/snapshots/*/{file}"))
    check_bundle(bundle_directory(NAME, QUIET))
    assert hub.fetched().count(file) == 2


def test_a_partial_file_of_another_program_is_neither_continued_nor_touched(
    hub: HubServer, tmp_path: Path, bundle: Path
) -> None:
    """Xet and earlier versions of huggingface_hub leave such files, the former with holes in them."""
    blobs = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    etag = hashlib.sha256((bundle / WEIGHTS).read_bytes()).hexdigest()
    others = [blobs / f"{etag}.incomplete", blobs / f"{etag}.0123abcd.incomplete"]
    for other in others:
        other.write_bytes(bytes(1000))
    check_bundle(bundle_directory(NAME, QUIET))
    assert [other.read_bytes() for other in others] == [bytes(1000)] * 2
    assert [asked.first_byte for asked in hub.log if asked.file == WEIGHTS and asked.method == "GET"] == [None]


@pytest.mark.deep
def test_two_processes_download_a_file_once_and_whole(hub: HubServer, tmp_path: Path) -> None:
    """The second one waits for the first, which is held in the middle of it."""
    hub.held[WEIGHTS] = threading.Event()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    processes = [start("zimage-rt", "info", NAME, "--verify", env=environment) for _ in range(2)]
    deadline = time.monotonic() + 60
    while heads(hub) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert heads(hub) >= 2, "both processes are at the weights"
    hub.held[WEIGHTS].set()
    for process in processes:
        outcome = finish(process)
        assert outcome.status == 0, outcome.err
    assert hub.fetched().count(WEIGHTS) == 1
    (path,) = (tmp_path / "home").glob(f"hub/models--*/snapshots/{COMMIT}")
    check_bundle(path)
    assert not list(tmp_path.rglob("*.incomplete"))


def heads(hub: HubServer) -> int:
    """How often the weights' size and hash were asked for."""
    return sum(asked.method == "HEAD" and asked.path.endswith(f"resolve/{COMMIT}/{WEIGHTS}") for asked in hub.log)


def test_a_manifest_that_lists_another_file_than_the_hub_has_is_refused_before_the_download(hub: HubServer) -> None:
    files = hub.models[NAME].commits[COMMIT]
    document = json.loads(files["manifest.json"])
    document["files"][WEIGHTS]["sha256"] = "0" * 64
    files["manifest.json"] = json.dumps(document).encode()
    with raises_with(HubError, NAME, WEIGHTS, "Hub", "manifest"):
        Hub(QUIET).bundle(NAME)
    assert hub.fetched() == ["manifest.json"]
