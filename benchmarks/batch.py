"""`zimage-rt batch` against a loop over `zimage-rt run` and one over `Pipeline.generate`, and on Ray against itself.

Systems take turns, each in processes of its own, so that a slow minute of the machine falls on all alike; what each
makes is compared byte for byte. Two parts:

- `loops`: the demo model, and a few blocks of the published width, 20 prompts each. A loop over `run` starts, loads and
  encodes for each image; a loop over `generate` encodes and decodes between the steps of others.
- `ray`: two workers of one core each, against one process that uses both cores, and against two independent processes
  of one core, each with half of the rows. Starting Ray is in the whole time.

    python benchmarks/batch.py --work DIR
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpu_step
from common import (
    RESULTS,
    cli_child,
    describe,
    machine,
    markdown_table,
    physical_threads,
    prepared_bundle,
    write_results,
)

RUN, GENERATE, BATCH = "loop over zimage-rt run", "loop over Pipeline.generate", "zimage-rt batch"
ONE, TWO, RAY = (
    "zimage-rt batch, one process",
    "two processes, half of the rows each",
    "zimage-rt batch --ray, 2 workers",
)
WORKERS = {TWO: 2, RAY: 2}
_PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow star",
    "two black dots in a large white ring",
    "a purple heart under an orange cross",
)

_GENERATE = """
import json, sys
from zimage_rt import Pipeline
bundle, rows, out = sys.argv[1:]
with Pipeline.from_bundle(bundle, "cpu") as pipeline:
    for line in open(rows, encoding="utf-8"):
        row = json.loads(line)
        result = pipeline.generate(row["prompt"], size=row["size"], steps=row["steps"], seed=row["seed"])
        result.save(f"{out}/{row['id']}.png")
"""


@dataclass
class Taken:
    """What the runs of a system took, one entry per round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)  # of the processes and their children
    busy: list[float] = field(default_factory=list)  # of each worker, on images; none for a loop

    def row(self, images: int, base: "Taken") -> dict[str, Any]:
        """Medians, and their ratios to another system's."""
        return {
            "wall_seconds": statistics.median(self.wall),
            "processor_seconds": statistics.median(self.processor),
            "images_per_second": images / statistics.median(self.wall),
            "busy_seconds": statistics.median(self.busy) if self.busy else None,
            "wall_of_base": statistics.median(a / b for a, b in zip(self.wall, base.wall, strict=True)),
            "processor_of_base": statistics.median(a / b for a, b in zip(self.processor, base.processor, strict=True)),
        }


def write_rows(path: Path, number: int, side: int, steps: int) -> list[dict[str, Any]]:
    """Rows of a few prompts, each with other words and its own seed."""
    rows = [
        {
            "id": f"{n:04}",
            "prompt": f"{_PROMPTS[n % len(_PROMPTS)]}, number {n}",
            "size": [side, side],
            "steps": steps,
            "seed": n,
        }
        for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def batch_words(rows: Path, bundle: Path, out: Path, *more: str) -> list[str]:
    """The command of a batch."""
    words = ["batch", str(rows), "-m", str(bundle), "-o", str(out), "--executor", "cpu", "--quiet", *more]
    return cli_child("zimage_rt.cli", *words)


def run_words(row: Mapping[str, Any], bundle: Path, out: Path) -> list[str]:
    """The command of one image."""
    size = "x".join(str(side) for side in row["size"])
    options = ["--size", size, "--steps", str(row["steps"]), "--seed", str(row["seed"]), "--executor", "cpu", "--quiet"]
    return cli_child("zimage_rt.cli", "run", row["prompt"], "-m", str(bundle), "-o", f"{out}/{row['id']}.png", *options)


def start(command: Sequence[str], **environment: str) -> "subprocess.Popen[bytes]":
    """A process that says nothing."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **environment})


def end(*processes: "subprocess.Popen[bytes]") -> None:
    """Waits for processes, all of which must end well."""
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError("a process failed")


def measure(systems: Mapping[str, Callable[[Path], None]], work: Path, rounds: int) -> dict[str, Taken]:
    """Runs all systems in turn, and compares what they make. Raises `RuntimeError` where images differ."""
    taken = {name: Taken() for name in systems}
    expected: dict[str, bytes] = {}
    for _ in range(rounds):
        for name, system in systems.items():
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            before, begin = _processor_seconds(), time.perf_counter()
            system(out)
            taken[name].wall.append(time.perf_counter() - begin)
            taken[name].processor.append(_processor_seconds() - before)
            paths = sorted(out.rglob("*.png"))
            if busy := _busy_seconds(out):
                taken[name].busy.append(busy / WORKERS.get(name, 1))
            found = {path.name: path.read_bytes() for path in paths}
            expected = expected or found
            if found != expected:
                raise RuntimeError(f"{name} makes other images")
            print(f"{name}: {taken[name].wall[-1]:.1f} s", file=sys.stderr, flush=True)
    return taken


def _busy_seconds(out: Path) -> float:
    """What the stages of all images took, as the manifests below a folder have it."""
    from pyarrow import parquet

    tables = [parquet.read_table(path, columns=["seconds"]) for path in out.rglob("manifest.parquet")]
    return sum(sum(table.column("seconds").to_pylist()) for table in tables)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loops(bundle: Path, side: int, steps: int, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One model: a batch against both loops."""
    path = options.work / "rows.jsonl"
    rows = write_rows(path, number, side, steps)

    def each(out: Path) -> None:
        for row in rows:
            end(start(run_words(row, bundle, out)))

    systems: dict[str, Callable[[Path], None]] = {
        BATCH: lambda out: end(start(batch_words(path, bundle, out))),
        GENERATE: lambda out: end(start([sys.executable, "-c", _GENERATE, str(bundle), str(path), str(out)])),
        RUN: each,
    }
    taken = measure(systems, options.work, options.rounds)
    return {
        "size": f"{side}x{side}",
        "steps": steps,
        "images": number,
        "base": BATCH,
        "rows": {name: one.row(number, taken[BATCH]) for name, one in taken.items()},
    }


def on_ray(bundle: Path, side: int, steps: int, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """The demo model on Ray, in one process, and in two that know nothing of each other."""
    path = options.work / "rows.jsonl"
    write_rows(path, number, side, steps)
    lines = path.read_text("utf-8").splitlines(keepends=True)
    halves = [options.work / f"half-{n}.jsonl" for n in range(2)]
    for n, half in enumerate(halves):
        half.write_text("".join(lines[n::2]), encoding="utf-8")

    def two(out: Path) -> None:
        end(*(start(batch_words(half, bundle, out / half.stem), OMP_NUM_THREADS="1") for half in halves))

    words = ("--workers", "2", "--cpus-per-worker", "1", "--ray", "local")
    systems: dict[str, Callable[[Path], None]] = {
        TWO: two,
        RAY: lambda out: end(start(batch_words(path, bundle, out, *words))),
        ONE: lambda out: end(start(batch_words(path, bundle, out))),
    }
    taken = measure(systems, options.work, options.rounds)
    return {
        "size": f"{side}x{side}",
        "steps": steps,
        "images": number,
        "base": TWO,
        "rows": {name: one.row(number, taken[TWO]) for name, one in taken.items()},
    }


def to_markdown(document: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Many images",
        "",
        f"{describe(document['machine'])}.",
        f"Threads: {document['threads']}; rounds: {document['rounds']}, systems in turn; load of the machine at the "
        f"start: {document['load']:.1f} processes. Seconds are medians, ratios are medians over the rounds. Images of "
        "all systems of a part are equal byte for byte. Processor seconds are of the command and its children, and "
        "leave out Ray's own processes. Busy is what the images' stages take in each worker: the rest is starting, "
        "checking, waiting and ending.",
        f"Made by `{document['command']}`.",
    ]
    for name, part in document["parts"].items():
        base = part["base"]
        header = ["", "wall, s", "images/s", "busy, s", "processor, s", "wall, ratio", "processor, ratio"]
        rows = [
            (
                system,
                f"{row['wall_seconds']:.1f}",
                f"{row['images_per_second']:.2f}",
                f"{row['busy_seconds']:.1f}" if row["busy_seconds"] else "-",
                f"{row['processor_seconds']:.1f}",
                f"{row['wall_of_base']:.2f}",
                f"{row['processor_of_base']:.2f}",
            )
            for system, row in part["rows"].items()
        ]
        what = f"{part['images']} images of {part['size']}, {part['steps']} steps; ratios to {base}"
        lines += ["", f"## {name}", "", f"{what}.", "", markdown_table(header, rows)]
        if RAY in part["rows"]:
            row = part["rows"][RAY]
            lines += [
                "",
                f"Ray's overhead against two independent processes: {row['wall_of_base'] - 1:+.0%} of the whole time, "
                f"its start and end included, which take {row['wall_seconds'] - row['busy_seconds']:.0f} s.",
            ]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, and gives the document; after each part it is written, too."""
    from zimage_rt import demo_bundle

    options.work.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "machine": machine("numpy", "onnxruntime", "ray"),
        "command": _command(options),
        "threads": physical_threads(),
        "rounds": options.rounds,
        "load": os.getloadavg()[0],
        "parts": {},
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if "demo" in options.parts:
        parts["Loops, demo model"] = lambda: loops(demo_bundle(), 128, 8, options.images, options)
    if "blocks" in options.parts:
        scale = cpu_step.scale(options.scale, options.layers)
        _, bundle = prepared_bundle(options.work, f"step-{options.scale}-{options.layers}", scale)
        what = f"Loops, {options.layers} layers of the published width"
        parts[what] = lambda: loops(bundle, options.side, options.steps, options.images, options)
    if "ray" in options.parts:
        parts["On Ray, demo model"] = lambda: on_ray(demo_bundle(), 128, 8, options.ray_images, options)
    for name, part in parts.items():
        document["parts"][name] = part()
        if options.scale == "real":
            write_results("batch", document, to_markdown(document), options.out)
    return document


def _command(options: argparse.Namespace) -> str:
    """What was run, without this machine's paths."""
    words = ["python benchmarks/batch.py --work DIR --layers", options.layers, "--side", options.side]
    words += ["--steps", options.steps, "--images", options.images, "--ray-images", options.ray_images]
    return " ".join(str(word) for word in [*words, "--rounds", options.rounds, "--parts", *options.parts])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and bundles are kept: 10 GB")
    parser.add_argument("--parts", nargs="+", choices=["demo", "blocks", "ray"], default=["demo", "blocks", "ray"])
    parser.add_argument("--scale", choices=["real", "tiny"], default="real")
    parser.add_argument("--layers", type=int, default=2, help="main layers, beside two refiners, of scale real")
    parser.add_argument("--side", type=int, default=256, help="pixels, of what the blocks generate")
    parser.add_argument("--steps", type=int, default=8, help="of what the blocks generate")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--ray-images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written (scale real only)")
    document = run(parser.parse_args())
    print(to_markdown(document))


if __name__ == "__main__":
    main()
