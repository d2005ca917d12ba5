"""A server that was started with other options than the defaults."""

import base64
import json
from collections.abc import Iterator

import pytest
from facts import has_fact
from PIL import Image
from server_tools import Generate, Server, decoded, follow, last_event, png, same, serving, submit, wait_for

pytestmark = pytest.mark.deep

PROMPT = "a red circle left of a blue square"
SMALL = {"prompt": PROMPT, "width": 64, "height": 48, "seed": 5}
LONG = {"prompt": "long", "width": 512, "height": 512, "steps": 50, "count": 16}
LIBRECHAT = {"prompt": PROMPT, "negative_prompt": "ugly", "cfg_scale": 4.5, "steps": 22, "width": 64, "height": 64}

HEADERS_SOON = "import zimage_rt.serve.late_answer as late; late.WAITS = late.BEATS = 0.01"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--as-asked", "--max-queue", "2", "--keep", "2", before=HEADERS_SOON) as running:
        yield running


def test_as_asked_does_what_is_asked(server: Server, generate: Generate) -> None:
    with server.client() as client:
        answer = client.post("/sdapi/v1/txt2img", json=LIBRECHAT | {"seed": 4}).json()
        fields = {"size": (64, 64), "steps": 22, "cfg_scale": 4.5, "negative": "ugly", "seed": 4}
        assert same(decoded(answer["images"][0]), generate(PROMPT, **fields).images[0])
        assert json.loads(answer["info"])["comments"] == ""
        refused = client.post("/sdapi/v1/txt2img", json=LIBRECHAT | {"sampler_name": "DDIM"})
        assert refused.status_code == 422
        assert has_fact(refused.json()["detail"], "DDIM")


def test_only_so_many_wait(server: Server) -> None:
    with server.client() as client:
        running = submit(client, LONG)
        wait_for(lambda: client.get(f"/api/jobs/{running}").json()["state"] == "running")
        waiting = [submit(client, SMALL), submit(client, SMALL)]
        for path, body in (("/api/jobs", SMALL), ("/sdapi/v1/txt2img", SMALL), ("/v1/images/generations", SMALL)):
            answer = client.post(path, json=body)
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
        client.delete(f"/api/jobs/{running}")
        assert [last_event(client, id)[0] for id in waiting] == ["done", "done"]
        assert server.metric('zimage_refusals_total{status="429"}') == 3


def test_images_beyond_what_is_kept_go(server: Server) -> None:
    """The oldest ones; and nothing else in the folder."""
    other = server.log.parent / "images" / "holiday.png"
    other.write_bytes(b"mine")
    with server.client() as client:
        names = [follow(client, submit(client, SMALL | {"seed": seed}))[-2].data["name"] for seed in range(4)]
        wait_for(lambda: len(list(other.parent.iterdir())) == 3)
        assert [image["name"] for image in client.get("/api/images").json()["images"]] == names[:1:-1]
        answer = client.post("/v1/images/generations", json={"prompt": "a", "size": "64x64", "n": 4})
        assert len(answer.json()["data"]) == 4, "images of an answer are kept until it is sent"
    assert other.read_bytes() == b"mine"


def test_an_answer_that_takes_long_has_its_headers_early(server: Server, generate: Generate) -> None:
    """Spaces until the JSON, or the error, is there: proxies and clients give up where nothing comes."""
    with server.client() as client:
        body = {"prompt": PROMPT, "size": "256x256", "seed": 5}
        answer = client.post("/v1/images/generations", json=body)
        assert answer.text.startswith(" ")
        expected = generate(PROMPT, seed=5, size=(256, 256)).images[0]
        assert same(decoded(answer.json()["data"][0]["b64_json"]), expected)
        a1111 = client.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "width": 256, "height": 256, "seed": 5})
        assert a1111.text.startswith(" ")
        assert same(decoded(a1111.json()["images"][0]), expected)
        black = base64.b64encode(png(Image.new("L", (256, 256)))).decode()
        failed = client.post("/v1/images/edits", json={"prompt": PROMPT, "image": black, "mask": black})
        assert "mask" in failed.json()["error"]["message"]
        with client.stream("POST", "/v1/images/generations", json=body | {"n": 10, "steps": 50}) as leaving:
            assert next(leaving.iter_text()) == " "
        wait_for(lambda: client.get("/api/jobs").json() == [])
