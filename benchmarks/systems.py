"""Images of the demo model by each system of `zimage-rt bench`, in seconds of the processor: for a busy machine.

    python benchmarks/systems.py --work DIR [--rounds 10]

Each system is a process of its own on one core, with one thread, so that the processor's seconds are what it computes
and not what it waits for. Images are compared with diffusers' in float32, same prompt, seed and steps. OpenVINO GenAI's
environment must be made first (`python -m zimage_rt.bench.systems.openvino_environment`); what cannot run is left out.
"""

import os
import statistics
import time
from importlib.metadata import PackageNotFoundError, version

from zimage_rt.bench.accuracy import psnr_db, read_pixels
from zimage_rt.bench.checkpoints import open_checkpoint
from zimage_rt.bench.children import Answer, own_peak, run_child
from zimage_rt.bench.job import WorkerJob
from zimage_rt.bench.schema import OURS, STEP, Case
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.synthetic import built
from zimage_rt.bench.systems import BASELINES, REFERENCE, find_system
from zimage_rt.bench.tables import column_table, mib
from zimage_runtime.command_line.progress import Progress

PROMPT, SEED, SIDE, STEPS = "a red circle left of a blue square", 7, 128, 8
SYSTEMS = (OURS, *BASELINES)


def child(options: Answer) -> Answer:
    """Loads one system's model on one core; generates once to warm up, then `rounds` times."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    system, precision = find_system(options["system"]), options["precision"]
    case = Case(
        options["system"], "", precision, "", "cpu", SIDE, SIDE, STEPS, SEED, PROMPT, options["rounds"], 1, threads=1
    )
    with own_peak() as peak:
        system.prepare()
        model = system.load(WorkerJob(case, options["model"], options["image"]))
        images, steps = [], []
        for _ in range(1 + options["rounds"]):
            clock = Clock()
            image = model.generate(clock)
            images.append(time.process_time() - clock.begin)
            steps += clock.steps[1:]  # the first may contain what follows the prompt
    image.save(options["image"])
    return {
        "image_seconds": statistics.median(images[1:]),
        "step_seconds": statistics.median(steps) if steps else None,
        "first_seconds": images[0],
        "anonymous_bytes": peak.anonymous,
        "versions": {name: version(name) for name in system.packages if is_installed(name)},
    }


class Clock:
    """Hears the ends of stages: seconds of the processor of each step."""

    def __init__(self) -> None:
        self.begin = self._last = time.process_time()
        self.steps: list[float] = []

    def __call__(self, stage: str, ended: float | None = None) -> None:
        """A stage ended."""
        now = time.process_time()
        if stage == STEP:
            self.steps.append(now - self._last)
        self._last = now


def is_installed(package: str) -> bool:
    """Whether this process could import it."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def measure(run: Run) -> Document:
    """Ours in each precision, and every system that can run."""
    original, rows = open_checkpoint("tiny", Progress(quiet=True), run.work / "layout"), []
    (run.work / "systems").mkdir(exist_ok=True)
    for name in run.options.systems:
        system = find_system(name)
        if reason := system.obstacle(original.config):
            run.note(f"{name} is left out: {reason}")
            continue
        for precision in run.options.precisions if name == OURS else [system.precision]:
            model = built("tiny", run.work / f"systems-{precision}", precision) if name == OURS else original.root
            image = run.work / f"{name}-{precision}.png"
            words = {"system": name, "precision": precision, "model": str(system.convert(model, run.work / "systems"))}
            asked = {**words, "image": str(image), "rounds": run.rounds, "limit": 900.0}
            rows.append({"system": name, "precision": precision, **run_child(__file__, "images", asked)})
    reference = read_pixels(run.work / f"{REFERENCE}-fp32.png")
    for row in rows:
        if "failed" not in row:
            psnr = psnr_db(read_pixels(run.work / f"{row['system']}-{row['precision']}.png"), reference)
            row["psnr_db"] = None if psnr == float("inf") else psnr
    return {"rounds": run.rounds, "rows": rows}


def page(document: Document) -> list[str]:
    """One row for each system."""
    columns = {
        "system": "{system} {precision}",
        "image, s of the processor": "{image_seconds:.3f}",
        "step": "{step_seconds:.4f}",
        "first image": "{first_seconds:.2f}",
        "own memory, MiB": lambda row: "–" if "failed" in row else mib(row["anonymous_bytes"]),
        "against diffusers fp32, dB": lambda row: (
            row["failed"] if "failed" in row else "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        ),
    }
    return [
        "The demo model by each system",
        f"{SIDE}x{SIDE}, {STEPS} steps, one thread; medians of {document['rounds']} images after the first. A model of "
        "six million parameters: what a system spends around its products counts for more than in the full model.",
        column_table(columns, document["rows"]),
        "; ".join(versions_text(row) for row in document["rows"] if "failed" not in row) + ".",
    ]


def versions_text(row: Document) -> str:
    """What a system's row was made with."""
    return f"{row['system']} {row['precision']}: " + ", ".join(f"{k} {v}" for k, v in row["versions"].items())


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("onnxruntime", "torch", "diffusers", "transformers"),
    work="200 MB",
    rounds=10,
    options={
        "systems": Option([OURS, REFERENCE, "openvino-genai", "openvino-genai-int8"], "those to run", SYSTEMS),
        "precisions": Option(["fp32", "int8"], "of our bundles"),
    },
    children={"images": child},
)

if __name__ == "__main__":
    SCRIPT.main()
