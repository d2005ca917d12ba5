"""Every executor for GPUs that is here, in one run and one report: correctness first, then memory, then speed.

    make bench-gpu                                                                  # everything; hours at full size
    python benchmarks/gpu.py --work DIR --scale blocks --only correctness memory    # minutes
    python benchmarks/gpu.py --work DIR --trial --scale small --out DIR/report      # without a GPU: CUDA's programs

Weights are random and made here: 20 GB in DIR at full size, and 21 GB for one bundle at a time; four blocks of the
published width are 3 GB. `--only` chooses sections:

  correctness   where nodes ran, images against the CPU's, 20 images in a row whose sizes take turns
  memory        each size, and each budget at one size: the peak by NVML against the plan; times and energy too
  speed         a step beside diffusers' eager and compiled; the first and the second start
  parts         int8 in both layouts, merged products, attention's two operators, copies, maps in another layout
  tensorrt      ways to compile kernels, a captured step or none, scratch memory at two sizes

Every measurement is a process of its own, for no longer than --limit, and is in the report as soon as it is there.
diffusers and torch are used where they are installed. Post the report's two files to share what a GPU did.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import RESULTS, machine, write_results
from gpu_cuda import PACKAGES, TORCH_TYPES, child_parity, child_placement, child_steps, prepared, size_of, ways
from gpu_images import Child, child_cycle, child_pictures, child_start
from gpu_page import page
from gpu_parts import child_attention, child_copies, child_layouts, child_provider
from gpu_tools import answer_in_child, run_child
from gpu_trt_settings import STRATEGIES, child_tensorrt

SECTIONS = ("correctness", "memory", "speed", "parts", "tensorrt")
EXECUTORS = ("cuda", "tensorrt", "webgpu")
TENSORRT = ("tensorrt_rtx", "tensorrt")
PROVIDER: dict[str, dict[str, str]] = {"as it is set": {}, "maps [N, H, W, C]": {"prefer_nhwc": "1"}}
"""Settings of ONNX Runtime's CUDA provider to compare, in one step and the autoencoder."""

CHILDREN: dict[str, Callable[[Child], Child]] = {
    "placement": child_placement,
    "parity": child_parity,
    "cycle": child_cycle,
    "pictures": child_pictures,
    "steps": child_steps,
    "start": child_start,
    "layouts": child_layouts,
    "attention": child_attention,
    "copies": child_copies,
    "provider": child_provider,
    "tensorrt": child_tensorrt,
}


def in_child(kind: str, options: Child, **environment: str) -> Child:
    """Runs a measurement in a process of its own."""
    return run_child(__file__, kind, options, **environment)


@dataclass(frozen=True)
class Row:
    """One measurement to make."""

    section: str
    kind: str
    name: str  # what sets it apart from its neighbours
    options: Child
    cache: Path | None = None  # the folder for caches, where starts are measured


@dataclass
class Run:
    """What is measured, on which executors."""

    given: argparse.Namespace
    half: str  # the 16-bit precision of the GPU
    executors: dict[str, str | None]  # why it is not here; None where it is

    @property
    def device(self) -> str:
        """Where CUDA's programs run."""
        return "cpu" if self.given.trial else "cuda"

    def options(self, executor: str, precision: str, scale: str, **more: Any) -> Child:
        """A measurement's options."""
        given = self.given
        return {
            "executor": self.device if executor == "cuda" else executor,
            "bundle": str(prepared(given.work, scale, precision, engines=executor == "tensorrt")),
            "precision": precision,
            "denoiser": None,
            "vram": None,
            "size": given.size[-1],
            "steps": given.steps,
            "repeat": given.repeat,
            "limit": given.limit,
            "dtype": TORCH_TYPES.get(precision, TORCH_TYPES[self.half]),
            "rate_seconds": 0.1 if given.trial else 3.0,
            **more,
        }

    def rows(self) -> Iterator[Row]:
        """Every measurement, in the order of what it is worth. Bundles are built as they are needed."""
        parts: dict[str, Callable[[str], Iterator[Row]]] = {
            "correctness": self.correctness,
            "memory": self.memory,
            "speed": self.speed,
            "parts": self.parts,
            "tensorrt": self.tensorrt,
        }
        for section in SECTIONS:
            for executor, reason in self.executors.items():
                if section in self.given.only and reason is None:
                    yield from parts[section](executor)

    def named(self, executor: str, precision: str) -> list[tuple[str, str | None]]:
        """A precision's names and denoisers: int8 has two on CUDA."""
        return ways(precision) if executor == "cuda" else [(precision, None)]

    def correctness(self, executor: str) -> Iterator[Row]:
        """Placement, parity, and many images in a row."""
        for precision in self.given.precision:
            # cuBLAS does not multiply int8 at the small model's widths
            scale = "wide" if precision == "int8" and not self.given.trial else "small"
            for name, denoiser in self.named(executor, precision):
                one = self.options(executor, precision, scale, denoiser=denoiser)
                if executor == "cuda":
                    yield Row("correctness", "placement", name, one)
                yield Row("correctness", "parity", name, one)
        first = self.options(executor, self.given.precision[0], self.given.scale)
        cycle = {**first, "sizes": self.given.size, "images": self.given.images}
        yield Row("correctness", "cycle", self.given.precision[0], cycle)

    def memory(self, executor: str) -> Iterator[Row]:
        """Images of each size with all that is free, and of one size in each budget."""
        for precision in self.given.precision:
            for name, denoiser in self.named(executor, precision):
                one = self.options(executor, precision, self.given.scale, denoiser=denoiser)
                for size in self.given.size:
                    yield Row("memory", "pictures", name, {**one, "size": size})
                for gib in self.given.vram:
                    budget = int(gib * 2**30)
                    size = self.given.size[len(self.given.size) // 2]
                    yield Row("memory", "pictures", f"{name}, {gib:g} GiB", {**one, "size": size, "vram": budget})

    def speed(self, executor: str) -> Iterator[Row]:
        """A step beside diffusers', for CUDA; for all, a first start and a second one."""
        precision = self.half if self.half in self.given.precision else self.given.precision[0]
        one = self.options(executor, precision, self.given.scale)
        if executor == "cuda":
            for size in self.given.size:
                for compiled in (False, True):  # apart, for compiling may take longer than there is
                    kind = "compiled" if compiled else "eager"
                    if self.given.trial and compiled:
                        continue
                    more = {"size": size, "diffusers": find_spec("diffusers") is not None, "compiled": compiled}
                    yield Row("speed", "steps", f"{precision}, {kind}", {**one, **more})
        with tempfile.TemporaryDirectory() as cache:
            for name in ("first start", "second start"):
                yield Row("speed", "start", f"{precision}, {name}", one, Path(cache))

    def parts(self, executor: str) -> Iterator[Row]:
        """What a step consists of, once."""
        if executor != "cuda":
            return
        one = self.options(executor, self.half if not self.given.trial else self.given.precision[0], self.given.scale)
        for kind in ("layouts", "attention", "copies"):
            if kind == "attention" or find_spec("torch"):
                yield Row("parts", kind, kind, one)
        for name, changed in PROVIDER.items():
            yield Row("parts", "provider", name, {**one, "changed": changed, "steps": 1, "repeat": 1})

    def tensorrt(self, executor: str) -> Iterator[Row]:
        """Its settings."""
        if executor != "tensorrt":
            return
        for precision in self.given.precision:
            one = self.options(executor, precision, self.given.scale, capture=True, strategy=STRATEGIES[0])
            if precision == self.given.precision[0]:
                for strategy in STRATEGIES:
                    yield Row("tensorrt", "tensorrt", f"{precision}, {strategy}", {**one, "strategy": strategy})
                yield Row("tensorrt", "tensorrt", f"{precision}, no capture", {**one, "capture": False})
            for size in (self.given.size[0], self.given.size[-1]):  # whether scratch is the shape's or the profile's
                yield Row("tensorrt", "tensorrt", f"{precision}, scratch", {**one, "size": size})


def measure(run: Run) -> Child:
    """Makes every measurement; the report is written after each."""
    given = run.given
    document: Child = {
        "machine": machine(*PACKAGES),
        "gpu": gpu_values(),
        "trial": given.trial,
        "scale": given.scale,
        "steps": given.steps,
        "executors": run.executors,
        "rows": [],
    }
    write_results(given.name, document, page(document), given.out)
    for row in run.rows():
        environment = {} if row.cache is None else {"XDG_CACHE_HOME": str(row.cache), "LOCALAPPDATA": str(row.cache)}
        options = {**row.options, "started": time.time()}
        result = in_child(row.kind, options, **environment)
        document["rows"].append(
            {
                "section": row.section,
                "kind": row.kind,
                "name": row.name,
                "executor": "cuda" if row.options["executor"] == "cpu" else row.options["executor"],
                "size": row.options["size"],
                "vram": row.options["vram"],
                "result": result,
            }
        )
        write_results(given.name, document, page(document), given.out)
    return document


def gpu_values() -> Child | None:
    """The GPU, without what identifies it; None where there is none."""
    from zimage_runtime.errors import ExecutorError
    from zimage_runtime.machine.gpus import find_gpu

    try:
        return {**vars(find_gpu()), "free": None, "uuid": None}
    except ExecutorError:
        return None


def executors_here(given: argparse.Namespace, precision: str) -> dict[str, str | None]:
    """Why each executor is not here; None where it is. A trial has CUDA's programs, on the CPU."""
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.executors.registry import executor_kind

    if given.trial:
        return {"cuda": None}
    found: dict[str, str | None] = {}
    for name in given.executor:
        if name == "tensorrt" and not any(map(find_spec, TENSORRT)):  # without it, no bundle for it can be built
            found[name] = f"neither {' nor '.join(TENSORRT)} is installed"
            continue
        bundle = Bundle.open(prepared(given.work, "small", precision, engines=name == "tensorrt"))
        unavailable = executor_kind(name).why_unavailable(bundle, 0)
        found[name] = unavailable.reason if unavailable else None
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--child"]:
        print(json.dumps(answer_in_child(CHILDREN, *words[1:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and bundles are put")
    parser.add_argument("--trial", action="store_true", help="on the CPU: shows that the benchmark runs, nothing else")
    parser.add_argument("--executor", nargs="+", choices=EXECUTORS, default=list(EXECUTORS))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--scale", choices=["full", "blocks", "small"], default="full")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp16", "int8", "int4"])
    parser.add_argument("--size", nargs="+", type=size_of, default=[(512, 512), (1024, 1024), (1536, 1536)])
    parser.add_argument("--vram", nargs="*", type=float, metavar="GIB", default=[6.0, 8.0, 12.0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--images", type=int, default=20, help="in a row, whose sizes take turns")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for each measurement")
    parser.add_argument("--name", default="gpu", help="of the report's files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    gpu = gpu_values()
    half = "fp16" if gpu and tuple(gpu["capability"]) < (8, 0) else "bf16"
    given.precision = given.precision or [half, "int8"]
    print(page(measure(Run(given, half, executors_here(given, given.precision[0])))))


if __name__ == "__main__":
    main()
