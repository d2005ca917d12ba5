"""Bundles by their name on the Hub: what is fetched, how it goes on after a break, and what is said when it fails."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_tools import Capture, assert_one_line_error, call_rt, finish, start
from facts import assert_facts, raises_with
from hub_server import COMMIT, SECOND_COMMIT, HubServer, hub_in_use

from zimage_runtime.bundle.hub import Hub, bundle_directory, hub_id
from zimage_runtime.bundle.hub_errors import HubError
from zimage_runtime.command_line.progress import Progress

NAME = "painters/z-image-tiny-fp32"
WEIGHTS = "transformer/weights.safetensors"
DRAW = ("--size", "64x64", "--steps", 1, "--seed", 7, "--quiet")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path) -> Iterator[HubServer]:
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        files = {p.relative_to(bundle).as_posix(): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
        server.add(NAME, {**files, "README.md": b"read me", "images/example.png": b"png", "old.bin": b"0"})
        yield server


@pytest.fixture
def quiet() -> Hub:
    return Hub(Progress(quiet=True))


def test_a_name_is_one_word_a_slash_and_another() -> None:
    names = ["a/b", "Tongyi-MAI/Z-Image-Turbo", "org_1/model.v2-int8"]
    paths = ["a", "a/b/c", "/a/b", "./a", "../a", ".a/b", "a/.b", "a\\b", "a/", "/a", "a/b\n", "a b/c", "", "C:/models"]
    assert [hub_id(text) for text in names] == names
    assert [hub_id(text) for text in paths] == [None] * len(paths)


def test_what_is_there_is_never_looked_up(
    hub: HubServer, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "painters").mkdir()
    (tmp_path / NAME).symlink_to(bundle)
    assert bundle_directory(NAME) == Path(NAME)
    assert hub.log == []


def test_run_generates_from_the_hub_what_it_generates_from_a_directory(
    hub: HubServer, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    far, near = tmp_path / "far.png", tmp_path / "near.png"
    outcome = call_rt(capsys, "run", "a cat", "-m", NAME, "-o", far, *DRAW)
    assert (outcome.status, outcome.out, outcome.err) == (0, f"{far}\n", "")
    assert call_rt(capsys, "run", "a cat", "-m", bundle, "-o", near, *DRAW).status == 0
    assert far.read_bytes() == near.read_bytes()
    wanted = json.loads((bundle / "manifest.json").read_bytes())["files"]
    assert set(hub.fetched()) <= {"manifest.json", *wanted}  # files of the same content are fetched once
    assert len(hub.fetched()) == len({(bundle / file).read_bytes() for file in ["manifest.json", *wanted]})


def test_what_the_cache_holds_is_not_fetched_again(hub: HubServer, quiet: Hub) -> None:
    first = quiet.bundle(NAME)
    hub.log.clear()
    assert quiet.bundle(NAME) == first
    assert first.revision == COMMIT
    assert hub.fetched() == []


def test_files_that_two_commits_share_are_fetched_once(hub: HubServer, quiet: Hub) -> None:
    first = quiet.bundle(NAME)
    hub.add(NAME, {**hub.models[NAME].commits[COMMIT], "manifest.json": _renamed(hub, "other")}, SECOND_COMMIT)
    hub.log.clear()
    second = quiet.bundle(NAME)
    assert (first.revision, second.revision) == (COMMIT, SECOND_COMMIT)
    assert WEIGHTS not in hub.fetched()
    assert (second.path / WEIGHTS).read_bytes() == (first.path / WEIGHTS).read_bytes()


def _renamed(hub: HubServer, name: str) -> bytes:
    document = json.loads(hub.models[NAME].commits[COMMIT]["manifest.json"])
    document["source"]["name"] = name
    return json.dumps(document).encode()


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(hub: HubServer, quiet: Hub, bundle: Path) -> None:
    hub.break_after[WEIGHTS] = [1 << 20]
    snapshot = quiet.bundle(NAME)
    assert (snapshot.path / WEIGHTS).read_bytes() == (bundle / WEIGHTS).read_bytes()
    assert _starts(hub) == [None, 1 << 20]


def test_a_run_that_failed_is_continued_by_the_next(hub: HubServer, bundle: Path, capsys: Capture) -> None:
    hub.break_after[WEIGHTS] = [1 << 20, *[0] * 20]
    outcome = call_rt(capsys, "run", "a cat", "-m", NAME, *DRAW)
    assert_one_line_error(outcome, NAME, "connection", "Hub", "again")
    hub.break_after.clear()
    hub.log.clear()
    path = bundle_directory(NAME, Progress(quiet=True))
    assert (path / WEIGHTS).read_bytes() == (bundle / WEIGHTS).read_bytes()
    assert _starts(hub) == [1 << 20]
    assert not list(path.parent.parent.glob("blobs/*.incomplete"))


def _starts(hub: HubServer) -> list[int | None]:
    """The first byte that each request for the weights asked for."""
    return [asked.first_byte for asked in hub.log if asked.file == WEIGHTS and asked.method == "GET"]


def test_the_rest_of_a_file_is_not_put_to_a_damaged_beginning(
    hub: HubServer, quiet: Hub, bundle: Path, tmp_path: Path
) -> None:
    hub.break_after[WEIGHTS] = [1 << 20, *[0] * 20]
    with pytest.raises(HubError):
        quiet.bundle(NAME)
    hub.break_after.clear()
    (partial,) = (tmp_path / "cache").glob("models--*/blobs/*.incomplete")
    partial.write_bytes(bytes(1 << 20))
    with raises_with(HubError, NAME, WEIGHTS, "damaged", "again"):
        quiet.bundle(NAME)
    assert (quiet.bundle(NAME).path / WEIGHTS).read_bytes() == (bundle / WEIGHTS).read_bytes()


def test_the_token_goes_to_the_hub_and_to_nobody_else(
    hub: HubServer, quiet: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models[NAME].token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    quiet.bundle(NAME)
    assert {asked.token for asked in hub.log if asked.host == "127.0.0.1"} == {"hf_secret"}
    assert {asked.token for asked in hub.log if asked.host == "localhost"} == {None}


def _private(hub: HubServer) -> None:
    hub.models[NAME].token = "hf_secret"


def _gated(hub: HubServer) -> None:
    hub.models[NAME].gated = True


def _gone(hub: HubServer) -> None:
    del hub.models[NAME]


def _no_manifest(hub: HubServer) -> None:
    del hub.models[NAME].commits[COMMIT]["manifest.json"]


def _no_weights(hub: HubServer) -> None:
    del hub.models[NAME].commits[COMMIT][WEIGHTS]


def _status(status: int) -> Callable[[HubServer], None]:
    def answer(hub: HubServer) -> None:
        hub.status = status

    return answer


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (_gone, ("directory", "Hub", "private", "`hf auth login`")),
        (_private, ("directory", "Hub", "private", "`hf auth login`")),
        (_gated, ("terms", "`hf auth login`")),
        (_no_manifest, ("bundle", "manifest.json")),
        (_no_weights, ("incomplete", WEIGHTS)),
        (_status(403), ("access", "`hf auth login`")),
        (_status(429), ("minutes", "`hf auth login`")),
        (_status(418), ("Hub", 418)),
        (_status(503), ("cache", "Hub", 503)),
        (_status(200), ("Hub", "HF_ENDPOINT", "proxy")),
    ],
)
def test_each_refusal_is_one_line(
    hub: HubServer, capsys: Capture, change: Callable[[HubServer], None], facts: tuple[object, ...]
) -> None:
    change(hub)
    assert_one_line_error(call_rt(capsys, "run", "a cat", "-m", NAME, *DRAW), NAME, *facts)
    assert WEIGHTS not in hub.fetched()


def test_a_token_that_the_hub_does_not_know_is_said_to_be_so(
    hub: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    hub.known_tokens = ["hf_secret"]
    assert_one_line_error(call_rt(capsys, "info", NAME), NAME, "token", "`hf auth login`")


def test_an_unknown_revision_is_named(hub: HubServer, quiet: Hub) -> None:
    with raises_with(HubError, NAME, "revision", "'v9'"):
        quiet.bundle(NAME, "v9")


def test_a_name_that_the_hub_does_not_allow_is_no_traceback(hub: HubServer, capsys: Capture) -> None:
    assert_one_line_error(call_rt(capsys, "info", "painters/a--b"), "painters/a--b", "directory", "Hub")


def test_a_manifest_that_leads_out_of_the_bundle_is_refused_before_anything_is_fetched(
    hub: HubServer, capsys: Capture
) -> None:
    files = hub.models[NAME].commits[COMMIT]
    files["manifest.json"] = files["manifest.json"].replace(WEIGHTS.encode(), b"../../../escaped.safetensors")
    assert_one_line_error(call_rt(capsys, "info", NAME), NAME, "manifest.json", "../../../escaped.safetensors")
    assert hub.fetched() == ["manifest.json"]


def test_without_a_network_the_cache_is_enough_and_its_lack_is_said(
    hub: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        path = bundle_directory(NAME, Progress(quiet=True))
        monkeypatch.setattr(constants, "ENDPOINT", closed)
        assert bundle_directory(NAME, Progress(quiet=True)) == path
        note = call_rt(capsys, "info", NAME).err
        assert_facts(note.strip(), NAME, "Connection refused", "cache")
        (path / WEIGHTS).unlink()
        outcome = call_rt(capsys, "run", "a cat", "-m", NAME, *DRAW)
        assert_one_line_error(outcome, NAME, WEIGHTS, "cache", "Connection refused")
        other = "painters/other"
        assert_one_line_error(call_rt(capsys, "info", other), other, "cache", "Connection refused")


def test_a_disk_without_room_is_found_before_anything_is_fetched(
    hub: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=70 << 20)
    monkeypatch.setattr("zimage_runtime.bundle.hub_download.shutil.disk_usage", lambda path: usage)
    outcome = call_rt(capsys, "run", "a cat", "-m", NAME, *DRAW)
    assert_one_line_error(outcome, tmp_path / "cache", NAME, "space", "0.07 GB", "HF_HOME")
    assert hub.fetched() == ["manifest.json"]


def test_a_disk_that_fills_up_on_the_way_is_one_line(
    hub: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fill(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fill)
    outcome = call_rt(capsys, "run", "a cat", "-m", NAME, *DRAW)
    assert_one_line_error(outcome, tmp_path / "cache", "space", NAME, "HF_HOME")


@pytest.mark.deep
def test_the_environment_says_where_the_hub_and_the_cache_are_and_that_there_is_none(
    hub: HubServer, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": hub.url}
    assert finish(start("zimage-rt", "info", NAME, env=environment)).status == 0
    assert list(home.glob(f"hub/models--*/snapshots/{COMMIT}/{WEIGHTS}"))
    hub.log.clear()
    environment["HF_HUB_OFFLINE"] = "1"
    assert finish(start("zimage-rt", "info", NAME, env=environment)).status == 0
    outcome = finish(start("zimage-rt", "info", "painters/other", env=environment))
    assert_one_line_error(outcome, "painters/other", "cache", "HF_HUB_OFFLINE")
    assert hub.log == []


def test_a_directory_needs_no_huggingface_hub(bundle: Path) -> None:
    code = (
        "import sys; from zimage_runtime.bundle.hub import bundle_directory; from zimage_rt.cli import cli;"
        f"bundle_directory({str(bundle)!r}); print('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
