"""WebGPU on a software adapter: full-width blocks against the CPU, and the memory of programs against their plan.

On Mesa's software Vulkan the library, its kernels and its allocations are those of a GPU; device memory is shared
memory of the process, so that it can be read. How fast a GPU is cannot be learned here, and no time is reported.

    python benchmarks/webgpu_block.py --work out/benchmarks            # half an hour on two cores, 10 GB of disk
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import RESULTS, describe, machine, markdown_table, mib, python_child, relative_error, write_results
from memory_model import Point, feeds
from memory_model import scale as memory_scale

from zimage_runtime.executors.overheads import ORT_WEBGPU
from zimage_runtime.model.programs import Program

_RUNS = 2  # the second may allocate otherwise than the first
_PRECISIONS = ("fp32", "fp16", "int8", "int4")
_REBALANCED = ("int8", "int4")
_BLOCK = Point("denoiser", 512, 512, 32)  # 1024 tokens of the image and 32 of the caption

_POINTS = (
    ("fp32", Point("text_encoder", tokens=32)),
    ("fp32", Point("text_encoder", tokens=512)),
    ("fp16", Point("text_encoder", tokens=512)),
    ("fp32", Point("caption", tokens=512)),
    ("fp32", Point("denoiser", 256, 256, 32)),
    ("fp32", Point("denoiser", 256, 256, 32, batch=2)),
    ("fp32", Point("denoiser", 512, 512, 32)),
    ("fp16", Point("denoiser", 256, 256, 32)),
    ("int8", Point("denoiser", 256, 256, 32)),
    ("int4", Point("denoiser", 256, 256, 32)),
    ("fp32", Point("decoder", 128, 128)),
    ("fp32", Point("decoder", 256, 256)),
    ("fp16", Point("decoder", 256, 256)),
    ("fp32", Point("encoder", 256, 256)),
)


@dataclass(frozen=True)
class Measured:
    """A program on the device. Bytes."""

    precision: str
    point: dict[str, Any]
    weights: int  # as the manifest counts them
    peak: int  # of device memory
    planned: int  # the same, in the executor's plan
    host: int  # the peak of the process's own memory
    to_same: float | None  # relative error to the same program on the CPU
    to_fp32: float | None  # relative error to the CPU's float32 program on the same inputs, where they mean the same


def block_scale() -> Any:
    """The published transformer's width, with one noise refiner and one layer; the rest is small."""
    from zimage_export.synthetic.checkpoint import FULL, SMALL, Scale

    transformer = replace(FULL.config.transformer, n_layers=1, n_refiner_layers=1, cap_feat_dim=64)
    return Scale(replace(SMALL.config, transformer=transformer))


def narrow_scale() -> Any:
    """`memory_model`'s, with an autoencoder of a quarter of the published width: convolutions take minutes here."""
    from zimage_export.synthetic.checkpoint import Scale

    config = memory_scale().config
    return Scale(replace(config, vae=replace(config.vae, block_out_channels=(32, 64, 128, 128))))


def bundle_in(work: Path, name: str, scale: Any, precision: str) -> Path:
    """A bundle of random weights in `work`, made when it is missing."""
    from zimage_export.build import BuildOptions, build
    from zimage_export.synthetic.checkpoint import write_checkpoint
    from zimage_runtime.bundle.manifest import Precision
    from zimage_runtime.command_line.progress import Progress

    checkpoint, bundle = work / f"{name}-checkpoint", work / f"{name}-{precision}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, scale, progress=Progress())
    if not bundle.exists():
        build(str(checkpoint), bundle, BuildOptions(Precision(precision)), Progress())
    return bundle


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))


@contextlib.contextmanager
def watched(peaks: dict[str, int]) -> Iterator[None]:
    """Looks at this process's device memory and its own every few milliseconds."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.003):
            for name in ("RssShmem", "RssAnon"):
                peaks[name] = max(peaks.get(name, 0), _status(name))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def child(options: dict[str, Any]) -> dict[str, Any]:
    """One program on the device; with `compare`, against the CPU, which runs in this process afterwards."""
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.executors.ort.webgpu import costs_on, webgpu_executor
    from zimage_runtime.executors.ort.webgpu_adapters import find_adapter
    from zimage_runtime.executors.protocol import UNLIMITED, Work
    from zimage_runtime.executors.worker import Stop
    from zimage_runtime.model.geometry import image_geometry

    bundle, point, adapter = Bundle.open(options["bundle"]), Point(**options["point"]), find_adapter()
    manifest, program = bundle.manifest, Program(point.program)
    inputs = feeds(manifest.config, point)
    peaks: dict[str, int] = {}
    executor = webgpu_executor(bundle, adapter, budget=UNLIMITED)
    with watched(peaks):
        for _ in range(_RUNS):
            outputs = executor.run_once(program, inputs, Stop())
    executor.close()
    record = manifest.record(program, executor.name)
    assert record is not None
    geometry = image_geometry(point.width, point.height, manifest.config)
    work = Work(geometry=geometry, tokens=point.tokens, batch=point.batch)
    planned = record.weight_bytes + costs_on(adapter, manifest, fused=False).activations(
        program, manifest, work, executor.name
    )
    name = next(iter(outputs))
    return asdict(
        Measured(
            precision=manifest.precision.value,
            point=options["point"],
            weights=record.weight_bytes,
            peak=peaks["RssShmem"],
            planned=planned,
            host=peaks["RssAnon"],
            to_same=relative_error(outputs[name], _on_cpu(bundle, executor.name, program, inputs)[name])
            if options["compare"]
            else None,
            to_fp32=relative_error(outputs[name], _on_cpu(Bundle.open(options["fp32"]), "cpu", program, inputs)[name])
            if options["fp32"]
            else None,
        )
    )


def _on_cpu(bundle: Any, executor: str, program: Program, inputs: Any) -> dict[str, Any]:
    """The outputs of a program on the CPU, whose weights are widened one after the other and never repacked."""
    import onnxruntime

    from zimage_runtime.executors.ort.host_programs import session_options
    from zimage_runtime.executors.ort.webgpu_library import REPACKING, WIDENING

    session = onnxruntime.InferenceSession(
        str(bundle.program(program, executor)),
        session_options(),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[REPACKING, *WIDENING],
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def measure(bundle: Path, point: Point, *, compare: bool = False, fp32: Path | None = None) -> Measured:
    """Runs `child` in a process of its own. What an interrupted run has measured before is taken from the folder."""
    fp32_bundle = str(fp32) if fp32 else None
    options = {"bundle": str(bundle), "point": asdict(point), "compare": compare, "fp32": fp32_bundle}
    start, kept = time.monotonic(), bundle / f"measured {point.label}.json"
    if not kept.exists():
        done = subprocess.run(python_child(__file__, options), stdout=subprocess.PIPE, text=True, check=True)
        kept.write_text(done.stdout.splitlines()[-1])
    found = Measured(**json.loads(kept.read_text()))
    print(
        f"{found.precision} {point.label}: {mib(found.peak)} MiB, planned {mib(found.planned)} MiB, errors "
        f"{found.to_same} {found.to_fp32} ({time.monotonic() - start:.0f} s)",
        file=sys.stderr,
    )
    return found


def report(description: dict[str, Any], adapter: str, blocks: list[Measured], programs: list[Measured]) -> str:
    """The page."""
    block_table = markdown_table(
        (
            "weights",
            "to the same program on the CPU",
            "to float32 on the CPU",
            "weights, MiB",
            "peak, MiB",
            "planned, MiB",
        ),
        [
            (
                m.precision,
                f"{m.to_same:.1e}",
                "" if m.to_fp32 is None else f"{m.to_fp32:.1e}",
                str(mib(m.weights)),
                str(mib(m.peak)),
                str(mib(m.planned)),
            )
            for m in blocks
        ],
    )
    program_table = markdown_table(
        ("program", "weights, MiB", "peak, MiB", "planned, MiB", "planned / peak"),
        [
            (
                f"{m.precision} {Point(**m.point).label}",
                str(mib(m.weights)),
                str(mib(m.peak)),
                str(mib(m.planned)),
                f"{m.planned / m.peak:.2f}",
            )
            for m in programs
        ],
    )
    return "\n".join(
        [
            "# WebGPU on a software adapter: full-width blocks, and memory",
            "",
            f"{describe(description)}; {adapter}.",
            "",
            "The processor computes, by the kernels that a GPU runs: whether and how exactly, never how fast.",
            "Made by `python benchmarks/webgpu_block.py`.",
            "",
            "## Full-width blocks",
            "",
            "A noise refiner on 1024 tokens and a layer on 1056, of 3840 channels in 30 heads, with random weights. "
            "Errors are the denoiser's: the norm of the difference over the norm. What is left to float32 on the CPU "
            "is the rounding of weights; bundles in int8 and int4 expect a rebalanced modulation table, so that random "
            "inputs do not mean the same to them. Peaks are of the device's memory, and plans without the "
            f"{mib(ORT_WEBGPU.nbytes)} MiB that are added for the library itself.",
            "",
            block_table,
            "",
            "## Memory of programs and the plan",
            "",
            "Transformer of width 768, text encoder of width 512, an autoencoder of a quarter of the published width.",
            "Each program ran twice in a process of its own.",
            "",
            program_table,
        ]
    )


def run(work: Path, out: Path | None, quick: bool) -> None:
    """Measures everything, then prints and writes the page."""
    from zimage_runtime.executors.ort.webgpu_adapters import find_adapter
    from zimage_runtime.executors.ort.webgpu_library import library_version

    adapter = find_adapter()
    if not adapter.software:
        sys.exit(f"device memory can be read of a software adapter alone; this one is {adapter}")
    work.mkdir(parents=True, exist_ok=True)
    programs = [
        measure(bundle_in(work, "webgpu-memory", narrow_scale(), precision), point)
        for precision, point in (_POINTS[:1] if quick else _POINTS)
    ]
    fp32 = bundle_in(work, "webgpu-block", block_scale(), "fp32")
    blocks = [
        measure(
            bundle_in(work, "webgpu-block", block_scale(), precision),
            _BLOCK,
            compare=True,
            fp32=None if precision in _REBALANCED else fp32,
        )
        for precision in (_PRECISIONS[-1:] if quick else _PRECISIONS)
    ]
    description = machine("numpy", "onnxruntime", "onnxruntime-ep-webgpu")
    page = report(description, f"{adapter}, {adapter.driver}", blocks, programs)
    print(page)
    if out:
        document = {
            "machine": description,
            "adapter": asdict(adapter),
            "library": library_version(),
            "blocks": [asdict(m) for m in blocks],
            "programs": [asdict(m) for m in programs],
        }
        write_results("webgpu_block", document, page, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--work", type=Path, default=Path("out/benchmarks"), help="where checkpoints and bundles are kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--quick", action="store_true", help="one program and one precision; nothing is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
    else:
        run(options.work, None if options.quick else options.out, options.quick)


if __name__ == "__main__":
    main()
