"""A ControlNet over the server's own API, as the page uses it."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from control_tools import TWO_ONE, Version, photograph
from facts import has_fact
from PIL import Image
from server_tools import Server, png, same, serving, start_server

from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

SMALL = {"prompt": "a fox", "width": 32, "height": 32, "seed": 3, "steps": 4}


@pytest.fixture(scope="module")
def net(net_of: Callable[[Version], Path]) -> Path:
    return net_of(TWO_ONE)


@pytest.fixture(scope="module")
def bundle_with_programs(extended_in: Callable[[Precision], Path]) -> Path:
    return extended_in(Precision.FP32)


@pytest.fixture(scope="module")
def server(bundle_with_programs: Path, net: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    out = tmp_path_factory.mktemp("server")
    with serving(out, "-m", bundle_with_programs, "--executor", "cpu", "--controlnet", net) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def made(client: httpx.Client, body: dict[str, object]) -> dict[str, object]:
    answer = client.post("/api/jobs", json=body)
    assert answer.status_code == 202, answer.text
    id = answer.json()["id"]
    client.get(f"/api/jobs/{id}/events")
    job = client.get(f"/api/jobs/{id}").json()
    assert job["state"] == "done", job
    image: dict[str, object] = job["images"][0]
    return image


def test_it_is_honoured_and_recorded(client: httpx.Client, bundle_with_programs: Path, net: Path) -> None:
    assert client.get("/api/state").json()["control"] is True
    url = "data:image/png;base64," + base64.b64encode(png(photograph(32, 32))).decode()
    body = SMALL | {"control": {"image": url, "scale": 1.0, "start": 0.0, "end": 0.5}}
    image = made(client, body)
    with Pipeline.from_bundle(bundle_with_programs, "cpu") as pipeline:
        fields = {"size": (32, 32), "seed": 3, "steps": 4}
        control = {"control": photograph(32, 32), "controlnet": net, "control_scale": 1.0, "control_end": 0.5}
        expected = pipeline.generate("a fox", **fields, **control).images[0]  # type: ignore[arg-type]
        plain = pipeline.generate("a fox", **fields).images[0]  # type: ignore[arg-type]
    assert same(Image.open(io.BytesIO(client.get(str(image["url"])).content)), expected)
    assert not same(plain, expected)
    settings = image["settings"]
    assert isinstance(settings, dict)
    assert {name: settings["control"][name] for name in ("type", "scale", "start", "end")} == {
        "type": None,
        "scale": 1.0,
        "start": 0.0,
        "end": 0.5,
    }
    assert same(Image.open(io.BytesIO(client.get(str(made(client, SMALL)["url"])).content)), plain)


@pytest.mark.parametrize(
    ("control", "facts"),
    [
        ({"image": "AAAA"}, ["the control image"]),
        ({"image": base64.b64encode(png(photograph(32, 32))).decode(), "scale": -1}, ["control_scale", "-1.0"]),
        ({"image": base64.b64encode(png(photograph(32, 32))).decode(), "type": "pose"}, ["control_type", "pose"]),
        ({"image": {"gallery": "none"}}, ["none"]),
        ({}, ["control.image"]),
    ],
)
def test_what_is_not_valid_is_refused(client: httpx.Client, control: dict[str, object], facts: list[str]) -> None:
    answer = client.post("/api/jobs", json=SMALL | {"control": control})
    assert answer.status_code == 422
    assert all(has_fact(answer.json()["detail"], fact) for fact in facts), answer.text


def test_without_the_option_control_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.client() as client:
        url = base64.b64encode(png(photograph(32, 32))).decode()
        answer = client.post("/api/jobs", json=SMALL | {"control": {"image": url}})
        assert answer.status_code == 422
        assert has_fact(answer.json()["detail"], "--controlnet")


def test_a_folder_that_is_no_controlnet_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        start_server(tmp_path, "--executor", "cpu", "--controlnet", tmp_path).stop()
    assert has_fact(str(caught.value), str(tmp_path))
    assert "Traceback" not in str(caught.value)
