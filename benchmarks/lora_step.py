"""One denoising step with LoRA on the CPU, against the step without: what branches beside the weights cost.

A few blocks of the published width. `none` is the extended program without LoRA; files change every linear of every
block. Variants take turns, and a ratio is of two calls in the same round. Beside it stands what switching takes:
reading the file (in the page cache) and making its matrices, for these blocks and, in proportion, for the full model.

    python benchmarks/lora_step.py --work DIR
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from cpu_step import scale

from zimage_rt import Pipeline
from zimage_rt.bench.accuracy import relative_error
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.steps import Calls, our_step
from zimage_rt.bench.synthetic import prepared, random_lora
from zimage_rt.bench.tables import column_table
from zimage_rt.bench.timing import interleave, ratio
from zimage_runtime.adapters.branches import NO_BRANCHES, make_branches
from zimage_runtime.adapters.reader import WeightedAdapter, read_adapter
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.machine.cores import thread_count
from zimage_runtime.model.blocks import layer_blocks

WITHOUT, NONE = "without", "extended, none"
_FULL_BLOCKS = 34  # of the published model
_SCALE = 0.2


def switch(run: Run, bundle: Bundle, path: Path) -> tuple[Any, float]:
    """The matrices of a file, and the seconds that reading it and making them took."""
    start = run.clock()
    adapter = read_adapter(path, bundle.manifest.config)
    branches = make_branches(bundle, [WeightedAdapter(adapter, 1.0)])
    return branches, run.clock() - start


def part(run: Run, root: Path, size: tuple[int, int]) -> Document:
    """The rows of one bundle and size."""
    bundle = Bundle.open(root)
    config = bundle.manifest.config
    share = _FULL_BLOCKS / len(layer_blocks("transformer", config))
    variants, switching = {NONE: NO_BRANCHES}, {}
    for rank in run.options.ranks:
        path = random_lora(run.work / f"rank-{rank}.safetensors", config, rank, _SCALE, half=True)
        taken = [switch(run, bundle, path) for _ in range(5)]
        variants[f"rank {rank}"] = taken[-1][0]
        switching[f"rank {rank}"] = statistics.median(seconds for _, seconds in taken)
    plain, extended = (Pipeline.from_bundle(root, "cpu") for _ in range(2))
    calls: Calls = {WITHOUT: our_step(plain, size).call}
    calls |= {name: our_step(extended, size, branches=branches).call for name, branches in variants.items()}
    outputs = {name: call() for name, call in calls.items()}
    if not np.array_equal(outputs[NONE], outputs[WITHOUT]):
        raise RuntimeError("the extended program gives other bits without LoRA")
    seconds = interleave(calls, run.rounds, run.clock)
    return {
        "precision": bundle.manifest.precision.value,
        "size": f"{size[0]}x{size[1]}",
        "rows": [
            {
                "variant": name,
                "median_seconds": statistics.median(taken),
                "of_without": vars(ratio(taken, seconds[WITHOUT])),
                "change": relative_error(outputs[name], outputs[WITHOUT]),
                "switch_seconds": switching.get(name),
                "switch_seconds_full_size": switching[name] * share if name in switching else None,
            }
            for name, taken in seconds.items()
        ],
    }


def measure(run: Run) -> Document:
    """Each precision at each size."""
    from zimage_export.programs import add_programs

    dimensions = scale("tiny" if run.trial else "real", run.options.layers)
    parts: list[Document] = []
    run.keep(
        blocks=len(layer_blocks("transformer", dimensions.config)),
        threads=thread_count(),
        rounds=run.rounds,
        seconds_of="processor" if run.options.cpu_time else "wall clock",
        parts=parts,
    )
    for precision in run.options.precisions:
        _, root = prepared(run.work, "step-trial" if run.trial else f"step-{run.options.layers}", dimensions, precision)
        add_programs(Bundle.open(root), ("cpu",), lora=True)
        for size in run.sizes:
            parts.append(part(run, root, size))
            run.keep()
    return {}


def page(document: Document) -> list[str]:
    """A table for each precision and size."""
    columns = {
        "variant": "{variant}",
        "median, s": "{median_seconds:.3f}",
        "of the step without": "{of_without[median]:.3f} ({of_without[least]:.2f}-{of_without[most]:.2f})",
        "change": "{change:.1e}",
        "switching, s": "{switch_seconds:.2f}",
        "at full size, s": "{switch_seconds_full_size:.2f}",
    }
    parts = [
        "A step with LoRA on the CPU",
        f"Random weights, {document['blocks']} blocks of the published width; LoRA of every linear of every block; "
        f"{document['threads']} threads; seconds of the {document['seconds_of']}; {document['rounds']} rounds.",
        "Seconds are of a machine that other work may share: compare ratios, which are medians over the rounds. The "
        "change is of the first step's velocity, relative to the one without. Switching is reading a file in the page "
        "cache and making its matrices, for these blocks and, in proportion, for the published model's 34.",
    ]
    for one in document["parts"]:
        parts += [f"## {one['precision']}, {one['size']}", column_table(columns, one["rows"])]
    return parts


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime"),
    work="10 GB",
    rounds=9,
    sizes=("256x256", "512x512"),
    cpu_time=True,
    trial=True,
    options={
        "layers": Option(2, "main layers"),
        "ranks": Option([32, 128], "of the files"),
        "precisions": Option(["fp32", "int8"], "of the bundles"),
    },
)

if __name__ == "__main__":
    SCRIPT.main()
