"""A real server in a process of its own, on a free port, and what tests ask of it."""

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from zimage_runtime.pipeline import Result

_ENTRY = "from zimage_rt.cli import main; main()  # shared test server"
PATIENCE = 60.0  # seconds for anything: no test asserts on time


@dataclass
class Server:
    """A server that runs."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path

    def client(self, **options: Any) -> httpx.Client:
        """A client of its own."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, **options)

    def metric(self, line: str) -> float:
        """A value of /metrics by its name and labels, 0 where there is none."""
        with self.client() as client:
            text = client.get("/metrics").text
        values = [each.rpartition(" ")[2] for each in text.splitlines() if each.rpartition(" ")[0] == line]
        return float(values[0]) if values else 0.0

    @property
    def engine(self) -> int:
        """The engine's process id."""
        import psutil

        (found,) = [
            child.pid
            for child in psutil.Process(self.process.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        return found

    def stop(self) -> None:
        """Stops gracefully."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()


def start_server(folder: Path, *arguments: object, before: str = "") -> Server:
    """Starts a server whose images go to `folder`/images, and waits until it is ready.

    `before` is code that its process runs first.
    """
    log = folder / "server.log"
    words = ["serve", "--port", "0", "--output-dir", folder / "images", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\n{_ENTRY}", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        process.wait(PATIENCE)
        raise AssertionError(f"the server did not start: {log.read_text()}")
    return Server(process, line, log)


@contextlib.contextmanager
def serving(folder: Path, *arguments: object, before: str = "") -> Iterator[Server]:
    """A server while the block runs."""
    server = start_server(folder, *arguments, before=before)
    try:
        yield server
    finally:
        server.stop()


@dataclass(frozen=True)
class Sent:
    """A server-sent event."""

    name: str
    data: Any
    number: int | None


def events_in(lines: Iterator[str]) -> Iterator[Sent]:
    """Server-sent events, read by the rules of the HTML standard that our server uses."""
    name, data, number = "message", "", None
    for line in lines:
        if not line and data:
            yield Sent(name, json.loads(data), number)
            name, data, number = "message", "", None
        elif line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            data += line[6:]
        elif line.startswith("id: "):
            number = int(line[4:])


def submit(client: httpx.Client, body: dict[str, Any]) -> str:
    """Queues a job over our own API, and returns its id."""
    answer = client.post("/api/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def follow(client: httpx.Client, id: str, **headers: str) -> list[Sent]:
    """All events of a job, as they come."""
    with client.stream("GET", f"/api/jobs/{id}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(events_in(answer.iter_lines()))


def last_event(client: httpx.Client, id: str) -> tuple[str, Any]:
    """Waits for the end of a job: the name and data of its last event."""
    last = follow(client, id)[-1]
    return last.name, last.data


def wait_for(condition: Any) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.02)


Generate = Callable[..., Result]
"""`Pipeline.generate` on the demo bundle: what the server's images are compared with."""


def png(image: Image.Image) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decoded(text: str | None) -> Image.Image:
    """An image from base64."""
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def same(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images have the same pixels."""
    return one.size == other.size and bool((np.asarray(one) == np.asarray(other)).all())
