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

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_images import Child, child_cycle, child_parity, child_pictures, child_start
from gpu_page import page
from gpu_parts import child_attention, child_copies, child_layouts, child_provider
from gpu_placement import child_placement
from gpu_steps import child_steps
from gpu_trt_settings import STRATEGIES, child_tensorrt

from zimage_rt.bench.children import run_child
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.synthetic import built, few_blocks
from zimage_runtime.bundle.precision import Precision

SECTIONS = ("correctness", "memory", "speed", "parts", "tensorrt")
EXECUTORS = ("cuda", "tensorrt", "webgpu")
TENSORRT = ("tensorrt_rtx", "tensorrt")
TORCH_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BLOCKS = 4  # of the scale of that name
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
class Cases:
    """What is measured, on which executors."""

    run: Run
    half: str  # the 16-bit precision of the GPU
    executors: dict[str, str | None]  # why it is not here; None where it is

    @property
    def given(self) -> Any:
        """The command line's options."""
        return self.run.options

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
            "size": self.run.sizes[-1],
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
        cycle = {**first, "sizes": self.run.sizes, "images": self.given.images}
        yield Row("correctness", "cycle", self.given.precision[0], cycle)

    def memory(self, executor: str) -> Iterator[Row]:
        """Images of each size with all that is free, and of one size in each budget."""
        for precision in self.given.precision:
            for name, denoiser in self.named(executor, precision):
                one = self.options(executor, precision, self.given.scale, denoiser=denoiser)
                for size in self.run.sizes:
                    yield Row("memory", "pictures", name, {**one, "size": size})
                for gib in self.given.vram:
                    budget = int(gib * 2**30)
                    size = self.run.sizes[len(self.run.sizes) // 2]
                    yield Row("memory", "pictures", f"{name}, {gib:g} GiB", {**one, "size": size, "vram": budget})

    def speed(self, executor: str) -> Iterator[Row]:
        """A step of each precision, for CUDA, in 16 bits beside diffusers'; for all, a first start and a second one."""
        own = self.half if self.half in self.given.precision else self.given.precision[0]
        for precision in self.given.precision if executor == "cuda" else ():
            for name, denoiser in self.named(executor, precision):
                one = self.options(executor, precision, self.given.scale, denoiser=denoiser)
                for size in self.run.sizes:
                    for kind in ("eager", "compiled"):  # apart, for compiling may take longer than there is
                        beside = precision == own and find_spec("diffusers") is not None
                        if kind == "compiled" and (self.given.trial or not beside):
                            continue
                        more = {"size": size, "diffusers": beside, "compiled": kind == "compiled"}
                        yield Row("speed", "steps", f"{name}, {kind}" if beside else name, {**one, **more})
        one, precision = self.options(executor, own, self.given.scale), own
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
            for size in (self.run.sizes[0], self.run.sizes[-1]):  # whether scratch is the shape's or the profile's
                yield Row("tensorrt", "tensorrt", f"{precision}, scratch", {**one, "size": size})


def ways(precision: str) -> list[tuple[str, str | None]]:
    """What to call a precision and which denoiser to run: int8 has two."""
    from zimage_runtime.bundle.manifest import CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY

    if precision != "int8":
        return [(precision, None)]
    return [("int8", CUDA), ("int8 weight-only", CUDA_WEIGHT_ONLY), ("int8 blocks", CUDA_BLOCKS)]


def scale_of(name: str) -> Any:
    """The dimensions to build: the published ones; those with few blocks; the tests' small ones; or "wide".

    cuBLAS does not multiply int8 at a width of 64, which the small model has ("CUBLAS failure 15" on an H100); "wide"
    has a block in each stage and linears as wide as the published ones, where it did, with 1 to 4224 rows.
    """
    from zimage_export.synthetic.checkpoint import SCALES

    if name == "wide":
        return few_blocks(small_vae=True)
    return few_blocks(BLOCKS, text_layers=BLOCKS, whole=True) if name == "blocks" else SCALES[name]


def prepared(work: Path, scale_name: str, precision: str, *, engines: bool = False) -> Path:
    """The bundle of a precision and scale, made where it is missing; at full size, the only one that is kept."""
    from zimage_export.synthetic.checkpoint import write_checkpoint
    from zimage_runtime.bundle.tensors import DType
    from zimage_runtime.command_line.progress import Progress

    checkpoint, bundle = work / f"checkpoint-{scale_name}", work / f"bundle-{scale_name}-{precision}"
    if engines:
        bundle = bundle.with_name(f"{bundle.name}-engines")
    if not checkpoint.exists():
        write_checkpoint(checkpoint, scale_of(scale_name), transformer_type=DType.BF16, progress=Progress())
    if scale_name == "full" and not bundle.exists():
        for other in work.glob("bundle-full-*"):
            shutil.rmtree(other)
    return built(checkpoint, bundle, precision, engines=engines)


def measure(run: Run) -> Document:
    """Makes every measurement; the report is written after each."""
    given, gpu = run.options, gpu_values()
    half = "fp16" if gpu and tuple(gpu["capability"]) < (8, 0) else "bf16"
    given.precision = given.precision or [half, "int8"]
    executors = executors_here(given, given.precision[0])
    rows: list[Child] = []
    run.keep(gpu=gpu, trial=run.trial, scale=given.scale, steps=given.steps, executors=executors, rows=rows)
    for row in Cases(run, half, executors).rows():
        environment = {} if row.cache is None else {"XDG_CACHE_HOME": str(row.cache), "LOCALAPPDATA": str(row.cache)}
        result = in_child(row.kind, {**row.options, "started": time.time()}, **environment)
        named = {"section": row.section, "kind": row.kind, "name": row.name, "executor": row.options["executor"]}
        named["executor"] = "cuda" if named["executor"] == "cpu" else named["executor"]
        rows.append({**named, "size": row.options["size"], "vram": row.options["vram"], "result": result})
        run.keep()
    return {}


def gpu_values() -> Child | None:
    """The GPU, without what identifies it; None where there is none."""
    from zimage_runtime.errors import ExecutorError
    from zimage_runtime.machine.gpus import find_gpu

    try:
        return {**vars(find_gpu()), "free": None, "uuid": None}
    except ExecutorError:
        return None


def executors_here(given: Any, precision: str) -> dict[str, str | None]:
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


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("onnxruntime-gpu", "onnxruntime", "torch", "diffusers", "numpy"),
    work="41 GB at full size",
    sizes=("512x512", "1024x1024", "1536x1536"),
    trial=True,
    options={
        "executor": Option(list(EXECUTORS), "those to measure", EXECUTORS),
        "only": Option(list(SECTIONS), "sections", SECTIONS),
        "scale": Option("full", "of the model", ("full", "blocks", "small")),
        "precision": Option([], "by default the GPU's 16 bits, and int8", tuple(Precision), str),
        "vram": Option([6.0, 8.0, 12.0], "budgets in GiB, at one size"),
        "steps": Option(8, "of an image"),
        "repeat": Option(3, "times that each thing is measured"),
        "images": Option(20, "in a row, whose sizes take turns"),
        "limit": Option(1800.0, "seconds for each measurement"),
    },
    children=CHILDREN,
)
main = SCRIPT.main

if __name__ == "__main__":
    main()
