"""Our own API: jobs and their events, plans, the gallery."""

import base64
import io
import json
import threading
from typing import Any

import httpx
import pytest
from facts import has_fact
from PIL import Image
from server_tools import Generate, Server, decoded, follow, png, same, submit, wait_for

from zimage_runtime.images.image_files import read_image_info

PROMPT = "a red circle left of a blue square"
SMALL = {"prompt": PROMPT, "width": 64, "height": 48, "seed": 5}
LONG = {"prompt": "long", "width": 512, "height": 512, "steps": 50, "count": 16}


def test_the_state_says_what_there_is(client: httpx.Client) -> None:
    state = client.get("/api/state").json()
    assert state["bundle"] == {"name": "tiny-fp16", "model": "tiny", "precision": "fp16", "variant": None}
    assert state["defaults"] | {"width": 128, "height": 128, "steps": 8, "cfg_scale": 1} == state["defaults"]
    assert state["limits"] == {
        "max_pixels": 3840 * 2160,
        "max_steps": 50,
        "max_count": 16,
        "max_queue": 64,
        "multiple": 16,
    }
    assert state["executor"] == "cpu"
    assert "euler" in state["samplers"]
    assert "beta" in state["schedulers"]
    assert (state["loras"], state["needs_key"]) == ([], False)


def test_a_job_from_its_place_in_the_queue_to_its_images(client: httpx.Client, generate: Generate) -> None:
    id = submit(client, SMALL | {"count": 2, "steps": 3})
    events = follow(client, id)
    names = [event.name for event in events]
    assert names == ["queued", "started", *["step"] * 3, "image", *["step"] * 3, "image", "done"]
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert events[0].data == {"position": 1}
    steps = [event.data for event in events if event.name == "step"]
    assert [(step["image"], step["step"], step["steps"]) for step in steps] == [
        (image, step, 3) for image in (0, 1) for step in (1, 2, 3)
    ]
    assert decoded(steps[-1]["preview"].partition(",")[2]).size == (8, 6)
    images = [event.data for event in events if event.name == "image"]
    expected = generate(PROMPT, size=(64, 48), seed=5, steps=3, count=2).images
    for index, (image, one) in enumerate(zip(images, expected, strict=True)):
        assert (image["index"], image["seed"], image["width"], image["height"]) == (index, 5 + index, 64, 48)
        assert same(Image.open(io.BytesIO(client.get(image["url"]).content)), one)
    done = client.get(f"/api/jobs/{id}").json()
    assert (done["state"], done["step"], done["steps"], len(done["images"])) == ("done", 6, 6, 2)


def test_events_are_replayed_and_go_on_where_they_were(client: httpx.Client) -> None:
    id = submit(client, SMALL | {"steps": 4})
    live = follow(client, id)
    again = follow(client, id)
    assert [(event.name, event.number) for event in again] == [(event.name, event.number) for event in live]
    previews = [event.data["preview"] for event in again if event.name == "step"]
    assert previews[:-1] == [None] * 3, "of earlier previews none is kept"
    assert previews[-1] is not None
    rest = follow(client, id, **{"Last-Event-ID": str(live[3].number)})
    assert [event.number for event in rest] == [event.number for event in live[4:]]


def test_the_settings_of_an_image_make_it_again(client: httpx.Client) -> None:
    body = SMALL | {
        "steps": 3,
        "cfg_scale": 2.5,
        "negative_prompt": "green",
        "sampler": "heun",
        "scheduler": "beta",
        "shift": 2.0,
        "variation_seed": 4,
        "variation_strength": 0.25,
    }
    first = follow(client, submit(client, body))[-2].data
    fields = set(body)
    assert {name: first["settings"][name] for name in fields} == body
    second = follow(client, submit(client, {name: first["settings"][name] for name in fields}))[-2].data
    assert client.get(first["url"]).content == client.get(second["url"]).content


def test_cancelling_what_waits_and_what_runs(client: httpx.Client) -> None:
    running, waiting = submit(client, LONG), submit(client, LONG)
    wait_for(lambda: client.get(f"/api/jobs/{running}").json()["step"] > 0)
    listed = client.get("/api/jobs").json()
    assert [(job["id"], job["state"], job["position"]) for job in listed] == [
        (running, "running", 0),
        (waiting, "waiting", 1),
    ]
    assert client.delete(f"/api/jobs/{waiting}").json()["state"] == "cancelled"
    client.delete(f"/api/jobs/{running}")
    for id in (waiting, running):
        assert follow(client, id)[-1].name == "cancelled"
    assert client.get("/api/jobs").json() == []
    assert follow(client, submit(client, SMALL))[-1].name == "done", "the next one runs"


def test_a_client_that_leaves_cancels(client: httpx.Client, server: Server) -> None:
    """Over the APIs on which it waits for its answer; a job of our own goes on without readers."""
    body = {"prompt": "left", "size": "512x512", "steps": 50, "n": 10}
    counts = {api: f'zimage_jobs_total{{api="{api}",state="cancelled"}}' for api in ("openai", "a1111")}
    before = {api: server.metric(line) for api, line in counts.items()}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/images/generations", json=body, timeout=0.3)
    with server.client(headers={"User-Agent": "another"}) as other, pytest.raises(httpx.ReadTimeout):
        other.post("/sdapi/v1/txt2img", json={"prompt": "left", "batch_size": 16, "steps": 12}, timeout=0.05)
    with client.stream("POST", "/v1/images/generations", json=body | {"stream": True, "partial_images": 3}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: client.get("/api/jobs").json() == [])
    cancelled = {api: server.metric(line) - before[api] for api, line in counts.items()}
    assert cancelled == {"openai": 2, "a1111": 1}


def test_clients_take_turns(client: httpx.Client, server: Server) -> None:
    """One client's ten jobs do not keep another's first waiting."""
    blocking = submit(client, LONG)
    mine = [submit(client, SMALL) for _ in range(3)]
    with server.client(headers={"User-Agent": "another"}) as other:
        theirs = [submit(other, SMALL) for _ in range(2)]
    order = [job["id"] for job in client.get("/api/jobs").json()]
    assert order == [blocking, mine[0], theirs[0], mine[1], theirs[1], mine[2]]
    moved = client.get(f"/api/jobs/{mine[2]}").json()["position"]
    assert moved == 5
    client.delete(f"/api/jobs/{blocking}")
    for id in (*mine, *theirs):
        assert follow(client, id)[-1].name == "done"


def test_the_gallery(client: httpx.Client) -> None:
    made = [follow(client, submit(client, SMALL | {"seed": seed}))[-2].data for seed in (1, 2, 3)]
    newest = client.get("/api/images", params={"limit": 2}).json()
    assert [image["name"] for image in newest["images"]] == [made[2]["name"], made[1]["name"]]
    assert newest["more"] is True
    assert newest["images"][0]["settings"] == made[2]["settings"]
    older = client.get("/api/images", params={"before": made[1]["name"], "limit": 1}).json()
    assert [image["name"] for image in older["images"]] == [made[0]["name"]]
    assert client.delete(f"/api/images/{made[2]['name']}").status_code == 204
    for method in ("GET", "DELETE"):
        path = f"/images/{made[2]['name']}" if method == "GET" else f"/api/images/{made[2]['name']}"
        assert client.request(method, path).status_code == 404
    assert client.get("/api/images", params={"limit": 1}).json()["images"][0]["name"] == made[1]["name"]


def test_an_image_of_the_gallery_as_input(client: httpx.Client, generate: Generate) -> None:
    made = follow(client, submit(client, SMALL))[-2].data
    source = generate(PROMPT, size=(64, 48), seed=5).images[0]
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (32, 0, 64, 48))
    url = "data:image/png;base64," + base64.b64encode(png(mask)).decode()
    body = SMALL | {"image": {"gallery": made["name"]}, "mask": url, "mask_grow": 8, "strength": 0.8, "seed": 6}
    edited = follow(client, submit(client, body))[-2].data
    fields = {"size": (64, 48), "seed": 6, "strength": 0.8, "mask_grow": 8}
    expected = generate(PROMPT, image=source, mask=mask, **fields).images[0]
    assert same(Image.open(io.BytesIO(client.get(edited["url"]).content)), expected)


def test_a_plan_before_anything_runs(client: httpx.Client) -> None:
    plan = client.post("/api/plan", json=SMALL).json()
    assert plan["fits"] is True
    assert plan["plan"]["peak"] > 0
    assert any("peak" in line for line in plan["lines"])


@pytest.mark.parametrize(
    ("body", "facts"),
    [
        ({}, ["prompt"]),
        ({"prompt": "a", "wdith": 64}, ["wdith"]),
        ({"prompt": "a", "width": 64}, ["height"]),
        ({"prompt": "a", "width": 40, "height": 64}, ["width", "40"]),
        ({"prompt": "a", "steps": 0}, ["steps", "0"]),
        ({"prompt": "a", "cfg_scale": 0.5}, ["cfg_scale", "0.5"]),
        ({"prompt": "a", "seed": 2**64}, ["seed"]),
        ({"prompt": "a", "strength": 0.5}, ["strength", "image"]),
        ({"prompt": "a", "image": {"gallery": "../server.log"}}, ["../server.log"]),
        ({"prompt": "a", "variation_seed": 1}, ["variation_strength"]),
        ({"prompt": "a", "loras": [{"name": "../../etc/passwd"}]}, ["--lora-dir"]),
        ({"prompt": "a", "shift": float("inf")}, ["shift"]),
    ],
)
def test_what_is_not_valid_is_refused(client: httpx.Client, body: dict[str, Any], facts: list[str]) -> None:
    content = json.dumps(body)  # with Infinity, which httpx would not send
    for path in ("/api/jobs", "/api/plan"):
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422
        assert all(has_fact(answer.json()["detail"], fact) for fact in facts), answer.text


def test_what_there_is_not(client: httpx.Client) -> None:
    for path in ("/api/jobs/none", "/api/jobs/none/events", "/images/none.png", "/nowhere", "/page/none.js"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.json()["code"] == "not_found"
    assert client.put("/api/jobs").status_code == 405


def test_many_readers_of_one_job(client: httpx.Client, server: Server) -> None:
    id = submit(client, SMALL | {"count": 3})
    found: list[list[tuple[str, int | None]]] = []

    def read() -> None:
        with server.client() as own:
            found.append([(event.name, event.number) for event in follow(own, id)])

    readers = [threading.Thread(target=read) for _ in range(5)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [found[0]] * 5
    assert found[0][-1][0] == "done"


def test_files_say_how_they_were_made(client: httpx.Client, server: Server) -> None:
    made = follow(client, submit(client, SMALL))[-2].data
    info = read_image_info(server.log.parent / "images" / made["name"])
    assert (info.prompt, info.seed, info.width) == (PROMPT, 5, 64)
