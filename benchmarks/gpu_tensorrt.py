"""The tensorrt executor on the GPU at hand, everything in one go and one report: a short time on a GPU is enough.

    python benchmarks/gpu_tensorrt.py BUNDLE... [--size 1024x1024] [--vram 6GiB]... [--out NAME]

For each bundle: the picture against the `cpu` executor's (unless --no-cpu: at full size that takes minutes), the peak
of device memory against what `zimage-rt plan` predicts, a step's time with all resident and in each budget, and the
first start against the second, which finds engines and compiled kernels in the cache. Bundles that differ in
precision only, given together, show what int8 costs and saves. A bundle needs `zimage-export engines` to be run on it.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import describe, machine, markdown_table, mib, write_results

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import ZImageRuntimeError
from zimage_runtime.executors.protocol import Options
from zimage_runtime.executors.tensorrt.executor import TensorRtExecutor
from zimage_runtime.executors.tensorrt.kind import open_executor
from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES, ResidencyPlan
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import CaptionEvent, ImageEvent, Pipeline, Request, StepEvent

PROMPT = "a red fox in the snow, golden hour"
PLAN_TOLERANCE = 0.05  # of the peak, between prediction and measurement

Open = Callable[[Bundle, int | None], TensorRtExecutor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is drawn, and how often."""

    size: tuple[int, int]
    steps: int
    budgets: tuple[int, ...]  # bytes, beside as much as is free
    repeat: int
    compare: bool  # with the cpu executor's picture


@dataclasses.dataclass
class Drawn:
    """One picture and how long it took."""

    latents: np.ndarray[Any, np.dtype[np.float32]]
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    caption: float
    steps: list[float]
    decode: float
    total: float


def draw(pipeline: Pipeline, settings: Settings) -> Drawn:
    """Draws one picture, every stage timed by itself."""
    start = time.perf_counter()
    caption, steps = 0.0, []
    pipeline.forget_prompt()  # every picture encodes it
    for event in pipeline.stream(PROMPT, size=settings.size, steps=settings.steps, seed=7):
        match event:
            case CaptionEvent():
                caption = event.seconds
            case StepEvent():
                steps.append(event.seconds)
            case ImageEvent():
                total = time.perf_counter() - start
                return Drawn(event.latents, np.asarray(event.image), caption, steps, event.seconds, total)
    raise RuntimeError("no picture came")


def measure(path: Path, settings: Settings, opening: Open) -> list[dict[str, Any]]:
    """One row a budget. The first row's start is the first of all; every later one is a second start."""
    bundle = Bundle.open(path)
    reference = draw(Pipeline.from_bundle(path, "cpu"), settings) if settings.compare else None
    rows: list[dict[str, Any]] = []
    for vram in (None, None, *settings.budgets):
        try:
            rows.append(_row(bundle, vram, settings, opening, reference, first=not rows))
        except ZImageRuntimeError as error:
            rows.append({"bundle": path.name, "budget": vram, "error": str(error)})
    return rows


def _row(
    bundle: Bundle, vram: int | None, settings: Settings, opening: Open, reference: Drawn | None, *, first: bool
) -> dict[str, Any]:
    begin = time.perf_counter()
    executor = opening(bundle, vram)
    free_before = executor.device.memory()[0]
    try:
        pipeline = Pipeline.on(bundle, executor)
        cold = draw(pipeline, settings)
        start = time.perf_counter() - begin
        warm = [draw(pipeline, settings) for _ in range(settings.repeat)]
        plan = predicted(pipeline, settings)
        row: dict[str, Any] = {
            "bundle": bundle.root.name,
            "precision": bundle.manifest.precision.value,
            "budget": vram,
            "start": "first" if first else "again",
            "device": executor.device.name,
            "seconds_to_first_picture": start,
            "seconds_caption": statistics.median(one.caption for one in warm),
            "seconds_step": statistics.median(s for one in warm for s in one.steps[1:] or one.steps),
            "seconds_decode": statistics.median(one.decode for one in warm),
            "seconds_picture": statistics.median(one.total for one in warm),
            "resident": len(plan.stages[Program.DENOISER].resident),
            "blocks": len(plan.stages[Program.DENOISER].needs.blocks),
            "peak_predicted": plan.peak,
            "peak_allocated": CONTEXT_BYTES + executor.peak_bytes,
            # what the driver counts while all that is kept is loaded: engines' code and CUDA's own needs included
            "held_by_driver": free_before - executor.device.memory()[0],
            "repeats_itself": bool((cold.latents == warm[-1].latents).all()),
        }
        row["plan_holds"] = abs(row["peak_allocated"] - plan.peak) <= PLAN_TOLERANCE * plan.peak
        if reference is not None:
            difference = np.linalg.norm(cold.latents - reference.latents) / np.linalg.norm(reference.latents)
            error = np.mean((cold.pixels.astype(float) - reference.pixels) ** 2)
            row["latents_error"] = float(difference)
            row["psnr_db"] = float(10 * np.log10(255**2 / error)) if error else float("inf")
        return row
    finally:
        executor.close()


def predicted(pipeline: Pipeline, settings: Settings) -> ResidencyPlan:
    """What `zimage-rt plan` says of the same picture."""
    plan = pipeline.prepare(Request(PROMPT, size=settings.size, steps=settings.steps, seed=7)).plan
    assert isinstance(plan, ResidencyPlan)
    return plan


def report(rows: Sequence[dict[str, Any]], settings: Settings, description: dict[str, Any]) -> str:
    """The report's text."""
    table = [
        [
            row["bundle"],
            "free memory" if row["budget"] is None else f"{mib(row['budget'])} MiB",
            row.get("start", ""),
            *(
                [row["error"], *[""] * 8]
                if "error" in row
                else [
                    f"{row['resident']}/{row['blocks']}",
                    f"{row['seconds_step'] * 1000:.0f} ms",
                    f"{row['seconds_decode'] * 1000:.0f} ms",
                    f"{row['seconds_picture']:.2f} s",
                    f"{row['seconds_to_first_picture']:.1f} s",
                    f"{mib(row['peak_predicted'])} / {mib(row['peak_allocated'])}",
                    f"{mib(row['held_by_driver'])}",
                    f"{row['latents_error']:.2g}, {row['psnr_db']:.0f} dB"
                    if "latents_error" in row
                    else "not measured",
                    "yes" if row["repeats_itself"] else "NO",
                ]
            ),
        ]
        for row in rows
    ]
    head = [
        "bundle", "budget", "start", "resident", "step", "decode", "picture", "to first picture",
        "peak MiB, plan / allocated", "driver MiB", "against cpu", "repeats",
    ]  # fmt: skip
    width, height = settings.size
    devices = ", ".join(sorted({row["device"] for row in rows if "device" in row})) or "none"
    return "\n".join(
        [
            "# TensorRT executor",
            "",
            f"GPU: {devices}. {describe(description)}.",
            f"{width}x{height}, {settings.steps} steps; medians of {settings.repeat} pictures after the first.",
            "Made by `python benchmarks/gpu_tensorrt.py`.",
            "",
            markdown_table(head, table),
            "",
        ]
    )


def run(bundles: Sequence[Path], settings: Settings, opening: Open) -> tuple[list[dict[str, Any]], str]:
    """All rows, and the report."""
    description = machine("tensorrt_rtx", "cuda-bindings", "numpy")
    rows = [row for path in bundles for row in measure(path, settings, opening)]
    return rows, report(rows, settings, description)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--vram", action="append", default=[], metavar="GIB", help="a budget in GiB, such as 4")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-cpu", action="store_true", help="do not compare with the cpu executor")
    parser.add_argument("--out", default="gpu_tensorrt", help="name of the result in benchmarks/results")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    budgets = tuple(int(float(text.removesuffix("GiB")) * 2**30) for text in arguments.vram)
    settings = Settings((width, height), arguments.steps, budgets, arguments.repeat, not arguments.no_cpu)
    try:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache  # so that the first start is a first one
            rows, text = run(
                arguments.bundles, settings, lambda bundle, vram: open_executor(bundle, Options(vram=vram))
            )
    except ZImageRuntimeError as error:
        parser.exit(1, f"error: {error}\n")
    write_results(arguments.out, {"settings": dataclasses.asdict(settings), "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
