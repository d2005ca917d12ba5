"""What rotating activations at run time adds to an int8 step on the CPU: the same weights with and without, in turns.

    PYTHONPATH=.:tests python benchmarks/int8_rotation_step.py --work DIR [--size 512x512] [--rounds 7]

One main block and one refiner of the published width, of random weights. Activations are rotated in groups of 256
before each quantization, as for weights that a file has rotated (ConvRot); the bundle beside it is the product's.
"""

import statistics

from int8_variants import Measured, Variant, built

from zimage_rt import Pipeline
from zimage_rt.bench.script import Document, Run, Script
from zimage_rt.bench.steps import our_step
from zimage_rt.bench.synthetic import few_blocks, prepared
from zimage_rt.bench.tables import column_table
from zimage_rt.bench.timing import interleave, ratio
from zimage_runtime.machine.cores import thread_count
from zimage_runtime.machine.int8_products import activation_bits

PLAIN, ROTATED = Variant("int8"), Variant("int8, rotated", rotated=True)


def measure(run: Run) -> Document:
    """Builds both bundles where they are missing, and times a step of each."""
    checkpoint, _ = prepared(run.work, "rotation", few_blocks())
    (size,), calls = run.sizes, {}
    for variant in (PLAIN, ROTATED):
        bundle = run.work / variant.name
        if not bundle.exists():
            built(checkpoint, bundle, variant, Measured({}, {}))
        step = our_step(Pipeline.from_bundle(bundle, "cpu", keep_loaded=False), size)
        calls[variant.name] = step.call
        step.call()
    seconds = interleave(calls, run.rounds, run.clock)
    over = ratio(seconds[ROTATED.name], seconds[PLAIN.name])
    return {
        "activation_bits": activation_bits(),
        "threads": thread_count(),
        "tokens": size[0] * size[1] // 256,
        "seconds": seconds,
        "rotated_over_plain": [over.least, over.median, over.most],
    }


def page(report: Document) -> list[str]:
    """One row for each variant."""
    rows = [
        {"name": name, "median": statistics.median(taken), "least": min(taken), "most": max(taken)}
        for name, taken in report["seconds"].items()
    ]
    columns = {"variant": "{name}", "median, s": "{median:.2f}", "least": "{least:.2f}", "most": "{most:.2f}"}
    return [
        "Rotating activations at run time",
        f"A step of one main block and one refiner of width 3840, {report['tokens']} image tokens: seconds of the "
        f"processor, {len(next(iter(report['seconds'].values())))} rounds in turns, on a machine that other work "
        "shared.",
        column_table(columns, rows),
        "Rotated over plain, round by round: median {1:.3f}, {0:.3f} to {2:.3f}.".format(*report["rotated_over_plain"]),
        f"Activations of {report['activation_bits']} bits, {report['threads']} threads.",
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime"),
    work="3 GB",
    rounds=7,
    sizes=("512x512",),
    cpu_time=True,
    path=".:tests",
)

if __name__ == "__main__":
    SCRIPT.main()
