"""What dies and what is stopped: the engine, the server, a job that does not obey."""

import contextlib
import io
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from facts import has_fact
from PIL import Image
from server_tools import PATIENCE, Server, last_event, serving, start_server, submit, wait_for

pytestmark = pytest.mark.deep

SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "seed": 5}
LONG = {"prompt": "long", "width": 512, "height": 512, "steps": 50, "count": 16}


def running(client: httpx.Client, id: str) -> None:
    wait_for(lambda: client.get(f"/api/jobs/{id}").json()["step"] > 0)


def test_an_engine_that_dies_fails_the_job_at_work_and_no_other(client: httpx.Client, server: Server) -> None:
    before = server.metric("zimage_engine_restarts_total")
    at_work = submit(client, LONG)
    waiting = [submit(client, SMALL) for _ in range(2)]
    running(client, at_work)
    first = server.engine
    os.kill(first, signal.SIGKILL)
    name, data = last_event(client, at_work)
    assert name == "failed"
    assert has_fact(data["message"], "SIGKILL")
    assert [last_event(client, id)[0] for id in waiting] == ["done", "done"]
    assert server.engine != first
    assert server.metric("zimage_engine_restarts_total") == before + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", {"prompt": "long", "size": "512x512", "steps": 50}),
        pytest.param(
            "/sdapi/v1/txt2img",
            {"prompt": "long", "width": 512, "height": 512, "steps": 12, "batch_size": 16},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_api_says_that_the_engine_died(
    client: httpx.Client, server: Server, path: str, body: dict[str, Any]
) -> None:
    """As a failure that asking again at once would not mend: OpenAI's clients ask again after others."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        with server.client() as own:
            answers.append(own.post(path, json=body))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: any(job["step"] for job in client.get("/api/jobs").json()))
    os.kill(server.engine, signal.SIGSEGV)
    asking.join()
    (answer,) = answers
    assert answer.status_code == 500
    assert has_fact(answer.text, "SIGSEGV")
    wait_for(lambda: client.get("/readyz").status_code == 200)
    if path.startswith("/v1"):
        assert answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["type"] == "server_error"


def test_a_job_that_came_to_a_dying_engine_is_run_by_the_next(client: httpx.Client, server: Server) -> None:
    os.kill(server.engine, signal.SIGSTOP)  # which takes the job and does nothing with it
    id = submit(client, SMALL)
    wait_for(lambda: client.get(f"/api/jobs/{id}").json()["state"] == "running")
    os.kill(server.engine, signal.SIGKILL)
    assert last_event(client, id)[0] == "done"


def test_but_not_one_that_was_cancelled_meanwhile(client: httpx.Client, server: Server) -> None:
    os.kill(server.engine, signal.SIGSTOP)
    id = submit(client, SMALL)
    wait_for(lambda: client.get(f"/api/jobs/{id}").json()["state"] == "running")
    client.delete(f"/api/jobs/{id}")
    os.kill(server.engine, signal.SIGKILL)
    assert last_event(client, id)[0] == "cancelled"


@pytest.mark.slow
def test_an_engine_that_does_not_obey_is_ended(tmp_path: Path) -> None:
    impatient = "import zimage_rt.serve.supervisor as supervisor; supervisor.OBEYS_WITHIN = 0.5"
    with serving(tmp_path, before=impatient) as server, server.client() as client:
        stuck, waiting = submit(client, LONG), submit(client, SMALL)
        running(client, stuck)
        first = server.engine
        os.kill(first, signal.SIGSTOP)
        client.delete(f"/api/jobs/{stuck}")
        assert last_event(client, stuck)[0] == "cancelled"
        assert last_event(client, waiting)[0] == "done"
        assert not psutil.pid_exists(first)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_server_that_is_killed_leaves_no_engine_and_nothing_half_written(tmp_path: Path) -> None:
    """In the middle of writing: what is served after the restart is whole."""
    server = start_server(tmp_path)
    try:
        with server.client() as client:
            submit(client, SMALL | {"count": 16})
            wait_for(lambda: len(client.get("/api/images").json()["images"]) >= 2)
        engine = psutil.Process(server.engine)
    finally:
        server.process.kill()
        server.process.communicate()
    engine.wait(30)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert engine.status() == psutil.STATUS_ZOMBIE
    half = tmp_path / "images" / ".zimage-0000000000000-000-000000.0123.part"
    half.write_bytes(b"half an image")
    os.utime(half, (1, 1))
    with serving(tmp_path) as again, again.client() as client:
        listed = client.get("/api/images").json()["images"]
        assert len(listed) >= 2
        for image in listed:
            assert image["settings"]["prompt"] == SMALL["prompt"]
            Image.open(io.BytesIO(client.get(image["url"]).content)).load()
        assert not half.exists()
        assert files_in(tmp_path / "images") == {image["name"] for image in listed}


@pytest.mark.slow
def test_an_engine_that_is_killed_while_it_writes_leaves_no_image(tmp_path: Path) -> None:
    """Killed at moments that differ: every file that has an image's name is a whole image."""
    with serving(tmp_path) as server, server.client() as client:
        for delay in range(3):
            id = submit(client, SMALL | {"count": 16, "seed": delay})
            wait_for(lambda id=id, delay=delay: len(client.get(f"/api/jobs/{id}").json()["images"]) > delay)
            os.kill(server.engine, signal.SIGKILL)
            assert last_event(client, id)[0] == "failed"
        for image in client.get("/api/images", params={"limit": 200}).json()["images"]:
            Image.open(io.BytesIO(client.get(image["url"]).content)).load()


def test_a_graceful_stop_finishes_what_runs_and_returns_what_waits(tmp_path: Path) -> None:
    server = start_server(tmp_path)
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, steps: int) -> None:
        with server.client() as own:
            body = {"prompt": name, "size": "256x256", "steps": steps, "seed": 1}
            answers[name] = own.post("/v1/images/generations", json=body)

    asking = [threading.Thread(target=ask, args=("runs", 12))]
    asking[0].start()
    with server.client() as client:
        wait_for(lambda: [job["state"] for job in client.get("/api/jobs").json()] == ["running"])
        asking.append(threading.Thread(target=ask, args=("waits", 1)))
        asking[1].start()
        wait_for(lambda: len(client.get("/api/jobs").json()) == 2)
    server.stop()
    for thread in asking:
        thread.join()
    assert answers["runs"].status_code == 200
    assert answers["waits"].status_code == 503
    assert int(answers["waits"].headers["Retry-After"]) > 0
    assert has_fact(answers["waits"].json()["error"]["message"], "stopping")
    assert server.process.returncode == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    server = start_server(tmp_path)
    try:
        with server.client() as client:
            running(client, submit(client, LONG))
            engine = server.engine
            server.process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.HTTPError):  # it takes no new connections, and closes this one
                wait_for(lambda: client.get("/healthz").status_code != 200)
        server.process.send_signal(signal.SIGINT)
        server.process.communicate(timeout=PATIENCE)
    finally:
        server.process.kill()
        server.process.wait()
    assert server.process.returncode == 130
    assert server.log.read_text().strip().splitlines()[-1:] == ["interrupted"]
    assert "Traceback" not in server.log.read_text()
    wait_for(lambda: not psutil.pid_exists(engine))


@pytest.mark.slow
def test_without_a_folder_images_are_gone_at_the_end() -> None:
    """They were in a temporary folder."""
    import subprocess
    import sys

    code = "from zimage_rt.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "serve", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            body = {"prompt": "a", "size": "64x64", "response_format": "url"}
            made = client.post("/v1/images/generations", json=body).json()["data"][0]["url"]
            assert client.get(made).status_code == 200
        opened = {Path(entry.path) for child in psutil.Process(process.pid).children() for entry in child.open_files()}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout and process.stdout.close()
    assert process.returncode == 0
    assert not [path for path in opened if path.name.startswith("zimage-") and path.exists()]


def test_the_next_free_port_is_taken(server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    with serving(tmp_path, "--port", port) as second, second.client() as client:
        assert int(second.url.rpartition(":")[2]) > int(port)
        assert client.get("/readyz").json() == {"status": "ready"}


def test_a_bundle_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        start_server(tmp_path, "-m", tmp_path).stop()
    assert has_fact(str(caught.value), "manifest.json")
    assert "Traceback" not in str(caught.value)


def test_an_executor_that_cannot_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        start_server(tmp_path, "--executor", "tensorrt").stop()
    assert has_fact(str(caught.value), "tensorrt")
    assert "Traceback" not in str(caught.value)
