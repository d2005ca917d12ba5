"""The server under load, and what it costs one client.

`overhead`: one client asks again and again, in turns with the bare pipeline, which writes the same file. Sizes are
the demo model's own and larger ones: the server's share is milliseconds, so that it shrinks with the image's time.

`load`: 64 clients send 500 requests over all three APIs: images of several sizes, some of which are cancelled by
leaving, and garbage. Every answer is compared with what Python generates for its prompt, seed and size; every refusal
with the status that the documentation states. Memory is that of /metrics, after a warm-up and at the end.

    python benchmarks/serve_load.py [--only overhead load]
"""

import argparse
import base64
import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from common import describe, interleave, machine, markdown_table, mib, ratio, write_results
from PIL import Image

from zimage_rt.demo import demo_bundle
from zimage_runtime.pipeline import Pipeline

PROMPTS = ("a red circle left of a blue square", "a green triangle", "two yellow squares")
SIZES = ((64, 64), (96, 64), (128, 128))
SEEDS = (1, 2)
PATIENCE = 600.0  # seconds


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("overhead", "load"), default=["overhead", "load"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    given = parser.parse_args()
    if "overhead" in given.only:
        measure_overhead(given.rounds)
    if "load" in given.only:
        measure_load(given.clients, given.requests)


@dataclass
class Server:
    """A server in processes of its own."""

    process: "subprocess.Popen[str]"
    url: str

    @classmethod
    def start(cls, folder: Path, *arguments: str) -> "Server":
        """Waits until it is ready."""
        words = ["serve", "--port", "0", "--executor", "cpu", "--output-dir", str(folder), *arguments]
        command = [sys.executable, "-c", "from zimage_rt.cli import main; main()", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return cls(process, process.stdout.readline().strip())

    def client(self, **options: Any) -> httpx.Client:
        """A client of its own."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, **options)

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by name and labels."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def stop(self) -> None:
        """Stops gracefully."""
        self.process.terminate()
        self.process.communicate()


def measure_overhead(rounds: int) -> None:
    """Writes serve_overhead.json and .md."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        server = Server.start(Path(folder))
        try:
            for side in (128, 256, 384):
                rows.append(_overhead(pipeline, server, side, rounds))
                print(rows[-1], file=sys.stderr)
        finally:
            server.stop()
    document = {"machine": machine("onnxruntime", "fastapi", "uvicorn"), "rounds": rounds, "rows": rows}
    columns = ("size", "bare, ms", "served, ms", "ratio", "difference, ms", "bare, ms of processor", "served", "ratio")
    table = markdown_table(
        columns,
        [
            (
                row["size"],
                f"{row['bare_ms']:.0f}",
                f"{row['served_ms']:.0f}",
                f"{row['ratio']:.3f}",
                f"{row['difference_ms']:.1f}",
                f"{row['bare_processor_ms']:.0f}",
                f"{row['served_processor_ms']:.0f}",
                f"{row['served_processor_ms'] / row['bare_processor_ms']:.3f}",
            )
            for row in rows
        ],
    )
    text = (
        "# What the server costs one client\n\n"
        f"{describe(document['machine'])}.\n"
        f"The demo model, 8 steps, {rounds} rounds in turns. *Bare* generates, encodes a PNG and writes it as "
        "`zimage-rt run` does; *served* is a whole request to `/v1/images/generations`. Ratio and difference are "
        "medians over the rounds. Processor time is that of all threads of the processes at work (web process and "
        "engine), a mean over the rounds: other work on the machine changes it less.\n"
        "Made by `python benchmarks/serve_load.py --only overhead`.\n\n"
        f"{table}\n"
    )
    write_results("serve_overhead", document, text)


def _overhead(pipeline: Pipeline, server: Server, side: int, rounds: int) -> dict[str, Any]:
    size = (side, side)
    web = psutil.Process(server.process.pid)
    engine = next(child for child in web.children() if "spawn_main" in " ".join(child.cmdline()))
    spent = {"bare": 0.0, "served": 0.0}

    def processor(*processes: psutil.Process) -> float:
        times = [process.cpu_times() for process in processes]
        return sum(one.user + one.system for one in times)

    with server.client() as client, tempfile.TemporaryDirectory() as folder:

        def bare() -> None:
            begin = processor(psutil.Process())
            result = pipeline.generate(PROMPTS[0], size=size, steps=8, seed=1)
            result.save(Path(folder) / "image.png")
            spent["bare"] += processor(psutil.Process()) - begin

        def served() -> None:
            begin = processor(web, engine)
            body = {"prompt": PROMPTS[0], "size": f"{side}x{side}", "steps": 8, "seed": 1}
            client.post("/v1/images/generations", json=body).raise_for_status()
            spent["served"] += processor(web, engine) - begin

        for _ in range(2):
            bare()
            served()
        spent.update(bare=0.0, served=0.0)
        seconds = interleave({"bare": bare, "served": served}, rounds)
    found = ratio(seconds["served"], seconds["bare"])
    differences = [1000 * (a - b) for a, b in zip(seconds["served"], seconds["bare"], strict=True)]
    return {
        "size": f"{side}x{side}",
        "bare_ms": 1000 * statistics.median(seconds["bare"]),
        "served_ms": 1000 * statistics.median(seconds["served"]),
        "ratio": found.median,
        "least": found.least,
        "most": found.most,
        "difference_ms": statistics.median(differences),
        "bare_processor_ms": 1000 * spent["bare"] / rounds,
        "served_processor_ms": 1000 * spent["served"] / rounds,
    }


@dataclass
class Tally:
    """What became of the requests."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, outcome: str, wrong: str | None = None) -> None:
        """Counts a request; `wrong` says what should not have happened."""
        with self.lock:
            self.outcomes[outcome] += 1
            if wrong is not None:
                self.wrong.append(wrong)


Expected = dict[tuple[str, tuple[int, int], int], np.ndarray]


def measure_load(clients: int, requests: int) -> None:
    """Writes serve_load.json and .md."""
    with Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        expected = {
            (prompt, size, seed): np.asarray(pipeline.generate(prompt, size=size, seed=seed, steps=4).images[0])
            for prompt in PROMPTS
            for size in SIZES
            for seed in SEEDS
        }
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        server = Server.start(Path(folder), "--max-queue", str(clients // 2))
        try:
            _clients(server, expected, 8, 40, Tally())  # a warm-up
            memory = [server.metrics()]
            begin = time.perf_counter()
            for part in range(5):
                _clients(server, expected, clients, requests // 5, tally, first=part * requests)
                memory.append(server.metrics())
            seconds = time.perf_counter() - begin
            _settle(server)
            end = server.metrics()
            left = [path.name for path in Path(folder).iterdir() if path.name.endswith(".part")]
        finally:
            server.stop()
    document = {
        "machine": machine("onnxruntime", "fastapi", "uvicorn"),
        "clients": clients,
        "requests": requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "wrong": tally.wrong,
        "unfinished_files": left,
        "waiting_at_the_end": end['zimage_queue_jobs{state="waiting"}'],
        "engine_restarts": end["zimage_engine_restarts_total"],
        "memory_mib": [
            {name: mib(int(one[f'zimage_memory_bytes{{process="{name}"}}'])) for name in ("server", "engine")}
            for one in memory
        ],
    }
    write_results("serve_load", document, _load_page(document))
    print(document, file=sys.stderr)


def _settle(server: Server) -> None:
    with server.client() as client:
        while client.get("/api/jobs").json():
            time.sleep(0.1)


def _clients(server: Server, expected: Expected, clients: int, requests: int, tally: Tally, first: int = 0) -> None:
    numbers = iter(range(first, first + requests))
    lock = threading.Lock()

    def work(name: str) -> None:
        with server.client(headers={"User-Agent": name}) as client:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                _request(client, expected, number, tally)

    threads = [threading.Thread(target=work, args=(f"client {index}",)) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _request(client: httpx.Client, expected: Expected, number: int, tally: Tally) -> None:
    """Three of five are images over an API in turn; one leaves early; one is garbage."""
    rng = random.Random(number)
    kind = number % 5
    try:
        if kind < 3:
            _image(client, expected, rng, (_openai, _a1111, _native)[kind], tally)
        elif kind == 3:
            _leave(client, rng, tally)
        else:
            _garbage(client, rng, tally)
    except Exception as error:
        tally.add("lost", f"request {number}: {type(error).__name__}: {error}")


Ask = Callable[[httpx.Client, str, tuple[int, int], int], tuple[httpx.Response, list[str]]]


def _image(client: httpx.Client, expected: Expected, rng: random.Random, ask: Ask, tally: Tally) -> None:
    prompt, size, seed = rng.choice(PROMPTS), rng.choice(SIZES), rng.choice(SEEDS)
    while True:
        answer, images = ask(client, prompt, size, seed)
        if answer.status_code != 429:
            break
        wait = int(answer.headers["Retry-After"])
        tally.add("refused because the queue was full, and asked again", None if wait >= 1 else "no Retry-After")
        time.sleep(min(wait, 5))
    if not answer.is_success or len(images) != 1:
        tally.add("failed", f"{answer.status_code} {answer.text[:200]}")
        return
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(images[0]))))
    right = pixels.shape == expected[prompt, size, seed].shape and (pixels == expected[prompt, size, seed]).all()
    tally.add("right image" if right else "wrong image", None if right else f"{prompt} {size} {seed}")


def _openai(client: httpx.Client, prompt: str, size: tuple[int, int], seed: int) -> tuple[httpx.Response, list[str]]:
    body = {"prompt": prompt, "size": f"{size[0]}x{size[1]}", "seed": seed, "steps": 4}
    answer = client.post("/v1/images/generations", json=body)
    return answer, [one["b64_json"] for one in answer.json().get("data", ())]


def _a1111(client: httpx.Client, prompt: str, size: tuple[int, int], seed: int) -> tuple[httpx.Response, list[str]]:
    body = {"prompt": prompt, "width": size[0], "height": size[1], "seed": seed, "steps": 4}
    answer = client.post("/sdapi/v1/txt2img", json=body)
    return answer, answer.json().get("images", [])


def _native(client: httpx.Client, prompt: str, size: tuple[int, int], seed: int) -> tuple[httpx.Response, list[str]]:
    body = {"prompt": prompt, "width": size[0], "height": size[1], "seed": seed, "steps": 4}
    answer = client.post("/api/jobs", json=body)
    if answer.status_code != 202:
        return answer, []
    id = answer.json()["id"]
    with client.stream("GET", f"/api/jobs/{id}/events") as stream:
        for _ in stream.iter_lines():
            pass
    images = client.get(f"/api/jobs/{id}").json()["images"]
    return answer, [base64.b64encode(client.get(one["url"]).content).decode() for one in images]


def _leave(client: httpx.Client, rng: random.Random, tally: Tally) -> None:
    body = {"prompt": "left", "size": "256x256", "steps": 50, "n": 10}
    try:
        answer = client.post("/v1/images/generations", json=body, timeout=rng.uniform(0.05, 1.0))
    except httpx.TimeoutException:
        tally.add("left, and was cancelled")
        return
    expected = answer.status_code == 429
    name = "refused because the queue was full, and left" if expected else "failed"
    tally.add(name, None if expected else f"{answer.status_code} {answer.text[:200]}")


_GARBAGE: tuple[tuple[str, bytes, set[int]], ...] = (
    ("/v1/images/generations", b"{", {400}),
    ("/v1/images/generations", b'{"prompt": "a", "size": "17x17"}', {400}),
    ("/v1/images/generations", b'{"prompt": 5}', {400}),
    ("/v1/images/edits", b'{"prompt": "a", "image": "AAAA"}', {400}),
    ("/sdapi/v1/txt2img", b'{"prompt": "a", "width": -16, "height": 64}', {422}),
    ("/sdapi/v1/img2img", b'{"prompt": "a", "init_images": []}', {422}),
    ("/sdapi/v1/txt2img", b"\xff\xfe", {422}),
    ("/api/jobs", b'{"prompt": "a", "unknown": 1}', {422}),
    ("/api/nothing", b"{}", {404, 405}),
)


def _garbage(client: httpx.Client, rng: random.Random, tally: Tally) -> None:
    path, content, statuses = rng.choice(_GARBAGE)
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    right = answer.status_code in statuses
    tally.add("garbage, refused as stated" if right else "failed", None if right else f"{path} {answer.status_code}")


def _load_page(document: dict[str, Any]) -> str:
    outcomes = markdown_table(("outcome", "count"), list(document["outcomes"].items()))
    memory = markdown_table(
        ("after", "web process, MiB", "engine, MiB"),
        [
            (
                "the warm-up" if index == 0 else f"{index * document['requests'] // 5} requests",
                one["server"],
                one["engine"],
            )
            for index, one in enumerate(document["memory_mib"])
        ],
    )
    return (
        "# The server under load\n\n"
        f"{describe(document['machine'])}.\n"
        f"{document['clients']} clients, {document['requests']} requests to the demo model over three APIs, a queue "
        f"of {document['clients'] // 2}; {document['seconds']:g} s. Every image was compared with Python's, pixel by "
        f"pixel. Wrong, lost or failed: {len(document['wrong'])}. Engine restarts: {document['engine_restarts']:g}; "
        f"jobs left in the queue: {document['waiting_at_the_end']:g}; unfinished files: "
        f"{len(document['unfinished_files'])}.\n"
        "Made by `python benchmarks/serve_load.py --only load`.\n\n"
        f"{outcomes}\n\nResident memory:\n\n{memory}\n"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
