"""LoRA over the server's APIs: named, never by a path, and the same images as from Python."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from facts import has_fact
from lora_tools import everywhere, lora
from server_tools import Server, decoded, same, serving, start_server

from zimage_rt.demo import demo_bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

SMALL = {"prompt": "a fox", "width": 32, "height": 32, "seed": 3, "steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, one of them in a folder of its own, and what is no LoRA."""
    found = tmp_path_factory.mktemp("loras")
    (found / "style").mkdir()
    lora(found / "style" / "ink.safetensors", seed=1)
    everywhere(found / "light.safetensors")
    (found / "broken.safetensors").write_bytes(b"no lora")
    (found / "notes.txt").write_text("not listed")
    return found


@pytest.fixture(scope="module")
def server(
    extended_in: Callable[[Precision], Path], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    out, root = tmp_path_factory.mktemp("server"), extended_in(Precision.FP32)
    with serving(out, "-m", root, "--executor", "cpu", "--lora-dir", folder) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def test_each_api_honours_them(client: httpx.Client, root: Path, folder: Path) -> None:
    with Pipeline.from_bundle(root, "cpu") as pipeline:
        fields = {"size": (32, 32), "seed": 3, "steps": 3}
        files = [(folder / "style" / "ink.safetensors", 0.8), (folder / "light.safetensors", -0.5)]
        expected = pipeline.generate("a fox", loras=files, **fields).images[0]  # type: ignore[arg-type]
        plain = pipeline.generate("a fox", **fields).images[0]  # type: ignore[arg-type]
    named = [{"name": "style/ink", "weight": 0.8}, {"name": "light", "weight": -0.5}]
    openai = {"prompt": "a fox", "size": "32x32", "seed": 3, "steps": 3}
    served = client.post("/v1/images/generations", json=openai | {"loras": named}).json()
    assert same(decoded(served["data"][0]["b64_json"]), expected)
    prompt = "a fox <lora:ink:0.8> <lora:light:-0.5>"
    a1111 = client.post("/sdapi/v1/txt2img", json=SMALL | {"prompt": prompt}).json()
    assert same(decoded(a1111["images"][0]), expected)
    without = client.post("/v1/images/generations", json=openai).json()
    assert same(decoded(without["data"][0]["b64_json"]), plain)
    assert not same(plain, expected)
    made = client.get("/api/images", params={"limit": 2}).json()["images"][1]
    assert made["settings"]["loras"] == [{"name": "ink", "weight": 0.8}, {"name": "light", "weight": -0.5}]


def test_they_are_listed(client: httpx.Client) -> None:
    names = ["broken", "light", "style/ink"]
    assert client.get("/api/state").json()["loras"] == [{"name": name} for name in names]
    listed = client.get("/sdapi/v1/loras").json()
    assert [one["name"] for one in listed] == names
    assert listed[2]["path"] == "ink.safetensors", "no path of the server's disk"


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("../style/ink", ["../style/ink", "style/ink"]),
        ("/etc/passwd", ["/etc/passwd"]),
        ("notes.txt", ["notes.txt"]),
        ("broken", ["broken.safetensors"]),
    ],
)
def test_no_other_file_is_read(client: httpx.Client, name: str, facts: list[str]) -> None:
    answer = client.post("/sdapi/v1/txt2img", json=SMALL | {"prompt": f"a fox <lora:{name}:1>"})
    assert answer.status_code == 422
    assert all(has_fact(answer.json()["detail"], fact) for fact in facts), answer.text


def test_a_bundle_without_the_programs_is_refused_at_the_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        start_server(tmp_path, "--executor", "cpu", "--lora-dir", folder).stop()
    assert has_fact(str(caught.value), "zimage-export programs")
    assert has_fact(str(caught.value), str(demo_bundle()))
