"""LoRA by their names on the Hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from facts import raises_with
from hub_server import HubServer, hub_in_use
from lora_tools import lora

from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.adapters.reader import read_adapter
from zimage_runtime.adapters.shelf import LoraShelf
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.hub import adapter_file
from zimage_runtime.bundle.hub_errors import HubError
from zimage_runtime.command_line.progress import Progress

QUIET = Progress(quiet=True)
NAME = "painters/fox-lora"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return lora(tmp_path / "fox.safetensors", 1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path) -> Iterator[HubServer]:
    with hub_in_use(monkeypatch, tmp_path / "cache") as server:
        server.add(NAME, {"fox.safetensors": file.read_bytes(), "README.md": b"read me"})
        server.add("painters/two", {"a.safetensors": file.read_bytes(), "sub/b.safetensors": file.read_bytes()})
        server.add("painters/none", {"a.pt": b"0"})
        yield server


def test_a_name_is_fetched(hub: HubServer, file: Path) -> None:
    assert adapter_file(NAME, QUIET).read_bytes() == file.read_bytes()
    assert adapter_file(f"{NAME}/fox.safetensors", QUIET).read_bytes() == file.read_bytes()
    assert adapter_file("painters/two/sub/b.safetensors", QUIET).read_bytes() == file.read_bytes()


def test_what_is_in_the_cache_is_used_offline(hub: HubServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter_file(NAME, QUIET)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert adapter_file(NAME, QUIET).read_bytes() == file.read_bytes()
    assert adapter_file(f"{NAME}/fox.safetensors", QUIET).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "text", ["fox.safetensors", "loras/fox.safetensors", "./painters/fox-lora", "/a/b.safetensors", "a/b/c.pt"]
)
def test_paths_are_not_looked_up(hub: HubServer, text: str) -> None:
    assert adapter_file(text, QUIET) == Path(text)
    assert hub.log == []


def test_what_is_there_is_a_path(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert adapter_file(NAME, QUIET) == Path(NAME)
    assert hub.log == []


def test_names_that_do_not_tell_a_file(hub: HubServer) -> None:
    with raises_with(HubError, "painters/two", "a.safetensors", "sub/b.safetensors", "painters/two/FILE"):
        adapter_file("painters/two", QUIET)
    with raises_with(HubError, "painters/none", ".safetensors"):
        adapter_file("painters/none", QUIET)
    with raises_with(HubError, "painters/two", "c.safetensors"):
        adapter_file("painters/two/c.safetensors", QUIET)
    with raises_with(HubError, "painters/unknown"):
        adapter_file("painters/unknown", QUIET)


def test_a_pipelines_lora_may_be_on_the_hub(hub: HubServer, bundle: Path, file: Path) -> None:
    (found,) = LoraShelf(Bundle.open(bundle)).open([GivenLora(NAME, 0.5)])
    assert (found.adapter.name, found.weight) == ("fox", 0.5)
    assert found.adapter.hash == read_adapter(file, SMALL.config).hash
