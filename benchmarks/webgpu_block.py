"""WebGPU on a software adapter: full-width blocks against the CPU, and the memory of programs against their plan.

On Mesa's software Vulkan the library, its kernels and its allocations are those of a GPU; device memory is shared
memory of the process, so that it can be read. How fast a GPU is cannot be learned here, and no time is reported.

    python benchmarks/webgpu_block.py --work out/benchmarks            # half an hour on two cores, 10 GB of disk
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory_model import Point, feeds

from zimage_rt.bench.accuracy import relative_error
from zimage_rt.bench.children import Answer, own_peak, run_child
from zimage_rt.bench.process_memory import HostMemory
from zimage_rt.bench.script import Document, Run, Script
from zimage_rt.bench.synthetic import few_blocks, memory_scale, prepared
from zimage_rt.bench.tables import column_table, mib
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


def device_memory() -> HostMemory:
    """This process's memory, with the device's (which is shared memory) in the place of the files'."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file if line.startswith("Rss")}
    return HostMemory(found["RssAnon"] + found["RssShmem"], found["RssAnon"], found["RssShmem"])


def child(options: Answer) -> Answer:
    """One program on the device, in bytes; with `compare`, also against the CPU, which runs in this process afterwards.

    Errors are relative: to the same program on the CPU, and to the CPU's float32 program on the same inputs, where they
    mean the same to it.
    """
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.executors.ort.webgpu import costs_on, webgpu_executor
    from zimage_runtime.executors.ort.webgpu_adapters import find_adapter
    from zimage_runtime.executors.protocol import UNLIMITED
    from zimage_runtime.executors.worker import Stop

    bundle, point, adapter = Bundle.open(options["bundle"]), Point(**options["point"]), find_adapter()
    manifest, program = bundle.manifest, Program(point.program)
    inputs = feeds(manifest.config, point)
    executor = webgpu_executor(bundle, adapter, budget=UNLIMITED)
    with own_peak(device_memory) as peak:
        for _ in range(_RUNS):
            outputs = executor.run_once(program, inputs, Stop())
    executor.close()
    record, costs = manifest.record(program, executor.name), costs_on(adapter, manifest, fused=False)
    assert record is not None
    activations = costs.activations(program, manifest, point.work(manifest.config), executor.name)
    name = next(iter(outputs))

    def error_to(other: Bundle, executor: str) -> float:
        return relative_error(outputs[name], _on_cpu(other, executor, program, inputs)[name])

    return {
        "precision": manifest.precision.value,
        "point": options["point"],
        "weights": record.weight_bytes,
        "peak": peak.file,
        "planned": record.weight_bytes + activations,
        "host": peak.anonymous,
        "to_same": error_to(bundle, executor.name) if options["compare"] else None,
        "to_fp32": error_to(Bundle.open(options["fp32"]), "cpu") if options["fp32"] else None,
    }


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


def measured(run: Run, bundle: Path, point: Point, *, compare: bool = False, fp32: Path | None = None) -> Answer:
    """Runs `child` in a process of its own. What an interrupted run has measured before is taken from the folder."""
    options = {"bundle": str(bundle), "point": asdict(point), "compare": compare, "fp32": str(fp32) if fp32 else None}
    found: Answer = run.once(bundle / f"measured {point.label}.json", lambda: run_child(__file__, "program", options))
    if "failed" in found:
        (bundle / f"measured {point.label}.json").unlink()
        raise RuntimeError(f"{bundle.name} {point.label}: {found['failed']}")
    return found


def measure(run: Run) -> Document:
    """Programs of small bundles, and full-width blocks."""
    from zimage_runtime.executors.ort.webgpu_adapters import find_adapter
    from zimage_runtime.executors.ort.webgpu_library import library_version

    adapter = find_adapter()
    if not adapter.software:
        sys.exit(f"device memory can be read of a software adapter alone; this one is {adapter}")
    narrow = memory_scale((32, 64, 128, 128))  # convolutions of the published width take minutes here
    programs = [
        measured(run, prepared(run.work, "webgpu-memory", narrow, precision)[1], point)
        for precision, point in (_POINTS[:1] if run.trial else _POINTS)
    ]
    block, blocks = few_blocks(text_layers=0, small_vae=True), []
    for precision in _PRECISIONS[-1:] if run.trial else _PRECISIONS:
        fp32 = None if precision in _REBALANCED else prepared(run.work, "webgpu-block", block)[1]
        bundle = prepared(run.work, "webgpu-block", block, precision)[1]
        blocks.append(measured(run, bundle, _BLOCK, compare=True, fp32=fp32))
    return {"adapter": asdict(adapter), "library": library_version(), "blocks": blocks, "programs": programs}


def page(document: Document) -> list[str]:
    """Both tables."""
    memory = {
        "weights, MiB": lambda row: mib(row["weights"]),
        "peak, MiB": lambda row: mib(row["peak"]),
        "planned, MiB": lambda row: mib(row["planned"]),
    }
    blocks = {
        "weights": "{precision}",
        "to the same program on the CPU": "{to_same:.1e}",
        "to float32 on the CPU": "{to_fp32:.1e}",
    }
    programs = {"program": lambda row: f"{row['precision']} {Point(**row['point']).label}"}
    adapter = document["adapter"]
    return [
        "WebGPU on a software adapter: full-width blocks, and memory",
        f"{adapter['name']} ({adapter['backend']}), {adapter['driver']}. The processor computes, by the kernels that a "
        "GPU runs: whether and how exactly, never how fast.",
        "## Full-width blocks",
        "A noise refiner on 1024 tokens and a layer on 1056, of 3840 channels in 30 heads, with random weights. "
        "Errors are the denoiser's: the norm of the difference over the norm. What is left to float32 on the CPU "
        "is the rounding of weights; bundles in int8 and int4 expect a rebalanced modulation table, so that random "
        "inputs do not mean the same to them. Peaks are of the device's memory, and plans without the "
        f"{mib(ORT_WEBGPU.nbytes)} MiB that are added for the library itself.",
        column_table(blocks | memory, document["blocks"]),
        "## Memory of programs and the plan",
        "Transformer of width 768, text encoder of width 512, an autoencoder of a quarter of the published width. "
        "Each program ran twice in a process of its own.",
        column_table(
            programs | memory | {"planned / peak": lambda row: f"{row['planned'] / row['peak']:.2f}"},
            document["programs"],
        ),
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime", "onnxruntime-ep-webgpu"),
    work="10 GB",
    trial=True,
    children={"program": child},
)

if __name__ == "__main__":
    SCRIPT.main()
