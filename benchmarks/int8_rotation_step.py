"""What rotating activations at run time adds to an int8 step on the CPU: the same weights with and without, in turns.

    PYTHONPATH=.:tests python benchmarks/int8_rotation_step.py --work DIR [--side 512] [--rounds 7]

One main block and one refiner of the published width, of random weights. Activations are rotated in groups of 256
before each quantization, as for weights that a file has rotated (ConvRot); the bundle beside it is the product's.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    describe,
    interleave,
    machine,
    markdown_table,
    physical_threads,
    ratio,
    write_results,
)
from int8_step import our_step
from int8_variants import Measured, Variant, built

from zimage_export.synthetic.checkpoint import FULL, Scale, write_checkpoint
from zimage_runtime.machine.int8_products import activation_bits

PLAIN, ROTATED = Variant("int8"), Variant("int8, rotated", rotated=True)


def main() -> None:
    """Builds both bundles where they are missing, measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="3 GB")
    parser.add_argument("--side", type=int, default=512, help="of the image")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = options.work / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, Scale(narrowed()))
    steps = {}
    for variant in (PLAIN, ROTATED):
        bundle = options.work / variant.name
        if not bundle.exists():
            built(checkpoint, bundle, variant, Measured({}, {}))
        steps[variant.name] = our_step(bundle, options.side)
    for step in steps.values():
        step()
    seconds = interleave(steps, options.rounds, time.process_time)
    over = ratio(seconds[ROTATED.name], seconds[PLAIN.name])
    report: dict[str, Any] = {
        "machine": machine("numpy", "onnxruntime"),
        "activation_bits": activation_bits(),
        "threads": physical_threads(),
        "tokens": (options.side // 16) ** 2,
        "seconds": seconds,
        "rotated_over_plain": [over.least, over.median, over.most],
    }
    write_results("int8_rotation_step", report, to_markdown(report), options.out)
    print(to_markdown(report))


def narrowed() -> Any:
    """The published sizes with one block of each kind, and a small text encoder."""
    config = FULL.config
    return replace(
        config,
        text_encoder=replace(config.text_encoder, num_hidden_layers=2, vocab_size=320),
        transformer=replace(config.transformer, n_layers=1, n_refiner_layers=1),
    )


def to_markdown(report: dict[str, Any]) -> str:
    """One row for each variant."""
    rows = [
        [name, f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]
        for name, values in report["seconds"].items()
    ]
    least, median, most = report["rotated_over_plain"]
    return (
        "# Rotating activations at run time\n\n"
        f"A step of one main block and one refiner of width 3840, {report['tokens']} image tokens: seconds "
        "of the processor, "
        f"{len(next(iter(report['seconds'].values())))} rounds in turns.\n\n"
        f"{markdown_table(['variant', 'median, s', 'least', 'most'], rows)}\n\n"
        f"Rotated over plain, round by round: median {median:.3f}, {least:.3f} to {most:.3f}.\n\n"
        f"`PYTHONPATH=.:tests python benchmarks/int8_rotation_step.py --work DIR`; activations of "
        f"{report['activation_bits']} bits, {report['threads']} threads; {describe(report['machine'])}; other work "
        "shared the machine\n"
    )


if __name__ == "__main__":
    main()
