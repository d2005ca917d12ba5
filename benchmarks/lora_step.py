"""One denoising step with LoRA on the CPU, against the step without: what branches beside the weights cost.

A few blocks of the published width. `none` is the extended program without LoRA; files change every linear of every
block. Variants take turns, and a ratio is of two calls in the same round. Beside it stands what switching takes:
reading the file (in the page cache) and making its matrices, for these blocks and, in proportion, for the full model.

    python benchmarks/lora_step.py --work DIR
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_step
import numpy as np
from common import (
    RESULTS,
    describe,
    interleave,
    machine,
    markdown_table,
    open_session,
    physical_threads,
    prepared_bundle,
    ratio,
    relative_error,
    write_results,
)
from int8_step import quantized_bundle

from zimage_runtime.adapters.branches import NO_BRANCHES, make_branches
from zimage_runtime.adapters.reader import WeightedAdapter, read_adapter
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import DType, encode_header
from zimage_runtime.model.blocks import layer_blocks
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.linears import block_linears

WITHOUT, NONE = "without", "extended, none"
_PROMPT, _SEED = "a lighthouse on a cliff at dusk, oil painting", 7
_FULL_BLOCKS = 34  # of the published model

Calls = dict[str, Callable[[], FloatArray]]


def write_lora(path: Path, config: ModelConfig, rank: int) -> Path:
    """A file of random values in fp16, with a change of every linear of every block."""
    rng = np.random.default_rng(rank)
    tensors: dict[str, np.ndarray] = {}
    for place in layer_blocks("transformer", config):
        for linear in block_linears(place, config):
            name = f"diffusion_model.{place.tensor(linear.name)}"
            down = rng.standard_normal((rank, linear.in_width), np.float32) / linear.in_width**0.5
            up = rng.standard_normal((linear.out_width, rank), np.float32) * 0.02
            tensors |= {f"{name}.lora_A.weight": down.astype("<f2"), f"{name}.lora_B.weight": up.astype("<f2")}
    with path.open("wb") as file:
        file.write(encode_header({name: (DType.F16, value.shape) for name, value in tensors.items()}))
        for value in tensors.values():
            file.write(value.tobytes())
    return path


def switch(bundle: Bundle, path: Path, clock: Callable[[], float]) -> tuple[Any, float]:
    """The matrices of a file, and the seconds that reading it and making them took."""
    start = clock()
    adapter = read_adapter(path, bundle.manifest.config)
    branches = make_branches(bundle, [WeightedAdapter(adapter, 1.0)])
    return branches, clock() - start


def steps(bundle: Bundle, side: int, branches: dict[str, Any]) -> Calls:
    """A call for each variant that gives the velocity of the first step."""
    from zimage_runtime.pipeline import Pipeline, Request

    calls: Calls = {}
    plain, extended = (Pipeline.from_bundle(bundle.root, "cpu") for _ in range(2))
    request = plain.prepare(Request(_PROMPT, size=(side, side), steps=8, seed=_SEED))
    latents = plain.initial_latents(request.geometry, request.seeds)
    for pipeline, variants in ((plain, {WITHOUT: None}), (extended, {NONE: NO_BRANCHES, **branches})):
        job = pipeline.prepare(Request(_PROMPT, size=(side, side), steps=8, seed=_SEED))
        for name, given in variants.items():
            session = open_session(job)
            hidden = pipeline.hidden_states(session, job.ids)
            denoiser = session.denoiser(pipeline.conditioning(job.geometry, job.schedule, hidden, given))
            calls[name] = lambda denoiser=denoiser: denoiser(latents, 0)
    return calls


def measure(root: Path, side: int, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of one bundle and size."""
    bundle = Bundle.open(root)
    config = bundle.manifest.config
    blocks = len(layer_blocks("transformer", config))
    clock = time.process_time if options.cpu_time else time.perf_counter
    branches, switching = {}, {}
    for rank in options.ranks:
        path = write_lora(options.work / f"rank-{rank}.safetensors", config, rank)
        taken = [switch(bundle, path, clock) for _ in range(5)]
        branches[f"rank {rank}"] = taken[-1][0]
        switching[f"rank {rank}"] = statistics.median(seconds for _, seconds in taken)
    calls = steps(bundle, side, branches)
    outputs = {name: call() for name, call in calls.items()}
    if not np.array_equal(outputs[NONE], outputs[WITHOUT]):
        raise RuntimeError("the extended program gives other bits without LoRA")
    seconds = interleave(calls, options.rounds, clock)
    return {
        "precision": bundle.manifest.precision.value,
        "size": f"{side}x{side}",
        "rows": [
            {
                "variant": name,
                "median_seconds": statistics.median(taken),
                "of_without": vars(ratio(taken, seconds[WITHOUT])),
                "change": relative_error(outputs[name], outputs[WITHOUT]),
                "switch_seconds": switching.get(name),
                "switch_seconds_full_size": switching[name] * _FULL_BLOCKS / blocks if name in switching else None,
            }
            for name, taken in seconds.items()
        ],
    }


def to_markdown(document: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# A step with LoRA on the CPU",
        "",
        f"{describe(document['machine'])}.",
        f"Random weights, {document['blocks']} blocks of the published width; LoRA of every linear of every block; "
        f"threads: {document['threads']}; seconds of the {document['seconds_of']}; {document['rounds']} rounds.",
        "Seconds are of a machine that other work may share: compare ratios, which are medians over the rounds. The "
        "change is of the first step's velocity, relative to the one without. Switching is reading a file in the page "
        "cache and making its matrices, for these blocks and, in proportion, for the published model's 34.",
        f"Made by `{document['command']}`.",
    ]
    header = ["variant", "median, s", "of the step without", "change", "switching, s", "at full size, s"]
    for part in document["parts"]:
        rows = []
        for row in part["rows"]:
            each = row["of_without"]
            switching = [f"{row[k]:.2f}" if row[k] else "-" for k in ("switch_seconds", "switch_seconds_full_size")]
            spread = f"{each['median']:.3f} ({each['least']:.2f}-{each['most']:.2f})"
            rows.append((row["variant"], f"{row['median_seconds']:.3f}", spread, f"{row['change']:.1e}", *switching))
        lines += ["", f"## {part['precision']}, {part['size']}", "", markdown_table(header, rows)]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the models, measures, and gives the document; after each part it is written, too."""
    from zimage_export.programs import add_programs

    options.work.mkdir(parents=True, exist_ok=True)
    scale = cpu_step.scale(options.scale, options.layers)
    checkpoint, fp32 = prepared_bundle(options.work, f"step-{options.scale}-{options.layers}", scale)
    document: dict[str, Any] = {
        "machine": machine("numpy", "onnxruntime"),
        "command": _command(options),
        "blocks": len(layer_blocks("transformer", scale.config)),
        "threads": physical_threads(),
        "rounds": options.rounds,
        "seconds_of": "processor" if options.cpu_time else "wall clock",
        "parts": [],
    }
    for precision in options.precisions:
        root = fp32 if precision == "fp32" else quantized_bundle(checkpoint, fp32, precision)
        add_programs(Bundle.open(root), ("cpu",), lora=True)
        for side in options.sides:
            document["parts"].append(measure(root, side, options))
            print(f"{precision} {side} done", file=sys.stderr)
            if options.scale == "real":
                write_results("lora_step", document, to_markdown(document), options.out)
    return document


def _command(options: argparse.Namespace) -> str:
    """What was run, without this machine's paths."""
    words = ["python benchmarks/lora_step.py --work DIR --layers", options.layers, "--sides", *options.sides]
    words += ["--ranks", *options.ranks, "--rounds", options.rounds, "--precisions", *options.precisions]
    return " ".join(str(word) for word in [*words, *(["--cpu-time"] if options.cpu_time else [])])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and bundles are kept: 10 GB")
    parser.add_argument("--scale", choices=["real", "tiny"], default="real")
    parser.add_argument("--layers", type=int, default=2, help="main layers of scale real")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="pixels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for a busy machine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written (scale real only)")
    document = run(parser.parse_args())
    print(to_markdown(document))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
