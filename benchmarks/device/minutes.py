"""What a GPU should show in a few minutes, in the order of what it is worth: correctness, memory, speed.

    bash benchmarks/device/run.sh PIECES SITE python3 benchmarks/device/minutes.py --out DIR [--seconds 540]

Every step is a process with a time limit, ended with all that it started. Its output is DIR/NAME.txt, and one line of
DIR/minutes.jsonl says how it ended, as soon as it has. Models are built in the background from the first second on. A
step is left out where the time that is left is less than half of its limit, and the line says so.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
PARTS = ("correctness", "memory", "speed")
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class Step:
    """One process. Steps of a part that stand together run at the same time, for they measure neither time nor peak."""

    part: str
    name: str
    words: tuple[str, ...]
    limit: float  # seconds
    together: bool = False
    needs: tuple[str, ...] = ()  # names of models


@dataclass(frozen=True)
class Model:
    """A bundle to build: a scale of `gpu.py` and a precision."""

    scale: str
    precision: str

    @property
    def name(self) -> str:
        """How steps call it."""
        return f"{self.scale}-{self.precision}"


def gpu_words(work: Path, out: Path, trial: bool, name: str, *more: str) -> tuple[str, ...]:
    """The command of the GPU benchmark, with a report of its own."""
    script = str(BENCHMARKS / "gpu.py")
    where = ("--trial",) if trial else ("--executor", "cuda")  # TensorRT for RTX serves no Hopper GPU
    return (sys.executable, script, "--work", str(work), "--out", str(out), "--name", name, *where, *more)


def cli_words(*words: str) -> tuple[str, ...]:
    """A command of zimage-rt, which is not installed there."""
    return (sys.executable, "-c", "from zimage_rt.cli import main; main()", *words)


def steps_of(work: Path, out: Path, trial: bool) -> tuple[list[Model], list[Step]]:
    """The models, in the order in which they are needed, and the steps."""
    precisions = ("fp32",) if trial else ("bf16", "fp16", "fp32", "int4", "int8")
    reduced = [Model("wide" if one == "int8" else "small", one) for one in precisions]
    steps = [Step("correctness", "doctor", cli_words("doctor"), 60, together=True)]
    for model in reduced:
        more = ("--only", "correctness", "--precision", model.precision, "--scale", "small", "--size", "64x64", "96x64")
        few = ("--images", "4", "--steps", "2", "--limit", "90")
        words = gpu_words(work, out, trial, f"correct-{model.precision}", *more, *few)
        steps.append(Step("correctness", f"correct-{model.precision}", words, 120, True, (model.name,)))
    if trial:
        words = gpu_words(work, out, trial, "memory", "--only", "memory", "--precision", "fp32", "--scale", "small")
        words += ("--size", "64x64", "--vram", "--steps", "1", "--repeat", "1", "--limit", "60")
        return reduced, [*steps, Step("memory", "memory", words, 90, needs=("small-fp32",))]
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "tests")
    steps.append(Step("correctness", "tests", (sys.executable, *tests), 150, together=True))
    engines = (sys.executable, str(BENCHMARKS / "gpu_torch_engines.py"))
    for model in (Model("small", "bf16"), Model("small", "int8")):
        words = (*engines, str(bundle_of(work, model)), "--size", "256", "--limit", "25")
        steps.append(Step("correctness", f"engines-{model.precision}", words, 80, True, (model.name,)))
    full, blocks, blocks8 = Model("full", "bf16"), Model("blocks", "bf16"), Model("blocks", "int8")
    size = ("--size", "1024x1024")
    some = ("--repeat", "2", "--limit", "60")

    def measured(part: str, name: str, limit: float, model: Model, only: str, *more: str) -> Step:
        chosen = ("--only", only, "--scale", model.scale, "--precision", model.precision, *some, *more)
        return Step(part, name, gpu_words(work, out, trial, name, *chosen), limit, needs=(model.name,))

    steps += [
        measured("memory", "memory-1024", 60, full, "memory", *size, "--vram", "14", "12", "8"),
        measured("memory", "memory-sizes", 90, full, "memory", "--size", "512x512", "1536x1536", "--vram"),
        measured("speed", "parts", 60, blocks, "parts", *size),
        measured("speed", "steps", 130, blocks, "speed", *size),
        measured("speed", "int8", 60, blocks8, "memory", *size, "--vram"),
    ]
    return [*reduced, Model("small", "int8"), full, blocks, blocks8], steps


def bundle_of(work: Path, model: Model) -> Path:
    """Where a model's bundle is put."""
    return work / f"bundle-{model.scale}-{model.precision}"


@dataclass
class Minutes:
    """The run: what time is left, and what was written."""

    out: Path
    work: Path
    end: float  # on the monotonic clock
    failed: list[str] = field(default_factory=list)  # models that could not be built
    builders: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def note(self, line: dict[str, Any]) -> None:
        """Writes how a step ended."""
        text = json.dumps(line)
        print(text, flush=True)
        with (self.out / "minutes.jsonl").open("a") as file:
            file.write(text + "\n")

    def build(self, models: Sequence[Model]) -> None:
        """Starts building, in two processes: small models in order, and what is large."""
        large = [model for model in models if model.scale in ("full", "blocks")]
        for number, some in enumerate(([model for model in models if model not in large], large)):
            if not some:
                continue
            words = [sys.executable, __file__, "--build", str(self.work), *(model.name for model in some)]
            with (self.out / f"build-{number}.txt").open("wb") as file:
                builder = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            self.builders.append(builder)

    def ready(self, names: Iterable[str], until: float) -> str | None:
        """Waits for models. Returns the reason where one does not come."""
        for name in names:
            while not (self.work / f"{name}.ready").exists():
                if all(builder.poll() is not None for builder in self.builders):
                    return f"{name} could not be built"
                if time.monotonic() > until:
                    return f"{name} was not built in time"
                time.sleep(_POLL)
        return None

    def take(self, step: Step) -> None:
        """Runs one step, or says why not."""
        line: dict[str, Any] = {"part": step.part, "step": step.name}
        if self.left < step.limit / 2:
            self.note({**line, "left_out": f"{self.left:.0f} s are left, and it may take {step.limit:.0f}"})
            return
        limit = min(step.limit, self.left)
        start = time.monotonic()
        if reason := self.ready(step.needs, start + limit / 2):
            self.note({**line, "left_out": reason})
            return
        with (self.out / f"{step.name}.txt").open("wb") as file:
            process = subprocess.Popen(
                step.words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=BENCHMARKS.parent
            )
        status: int | str
        try:
            status = process.wait(max(limit - (time.monotonic() - start), 1))
        except subprocess.TimeoutExpired:
            status = f"not done in {limit:.0f} s"
        end_group(process)
        self.note({**line, "seconds": round(time.monotonic() - start, 1), "status": status})

    def run(self, steps: Sequence[Step]) -> None:
        """All steps: those that may, at the same time; then the others, one by one."""
        for part in PARTS:
            mine = [step for step in steps if step.part == part]
            together = [step for step in mine if step.together]
            if together:
                with ThreadPoolExecutor(len(together)) as pool:
                    list(pool.map(self.take, together))
            for step in mine:
                if not step.together:
                    self.take(step)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started: a measurement's own child would otherwise hold the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def build_models(work: Path, names: Sequence[str]) -> None:
    """Builds bundles one after the other, and marks each that is complete."""
    sys.path[:0] = [str(BENCHMARKS)]
    from gpu import prepared

    for name in names:
        scale, _, precision = name.partition("-")
        start = time.monotonic()
        prepared(work, scale, precision)
        (work / f"{name}.ready").touch()
        print(name, f"{time.monotonic() - start:.1f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--build"]:
        build_models(Path(words[1]), words[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results are put")
    parser.add_argument("--work", type=Path, default=Path("/tmp/zimage-gpu"), help="where models are put")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--trial", action="store_true", help="on the CPU, small: shows that the script runs")
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    given.work.mkdir(parents=True, exist_ok=True)
    minutes = Minutes(given.out, given.work, time.monotonic() + given.seconds)
    models, steps = steps_of(given.work, given.out, given.trial)
    steps = [step for step in steps if step.part in given.only]
    wanted = {name for step in steps for name in step.needs}
    minutes.build([model for model in models if model.name in wanted])
    try:
        minutes.run(steps)
    finally:
        for builder in minutes.builders:
            end_group(builder)


if __name__ == "__main__":
    main()
