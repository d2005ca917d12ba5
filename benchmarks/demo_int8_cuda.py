"""How far int8 images of the demo model are from float32's: the CPU's programs, and both kinds of CUDA's.

    PYTHONPATH=. python benchmarks/demo_int8_cuda.py --work DIR [--prompts 24] [--device cuda]

CUDA's programs run on the CPU unless a GPU is named. One image says little: where a prompt is near a decision of the
model, any perturbation changes what is drawn, so the table gives quantiles over many.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, describe, machine, markdown_table, relative_error, write_results

from demo_model.scoring import held_out_requests
from zimage_export.build import BuildOptions, build
from zimage_rt.bench.accuracy import psnr_db
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY, Precision
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.executors.ort.cuda import cuda_executor
from zimage_runtime.executors.ort.device import OrtDevice
from zimage_runtime.machine.int8_products import activation_bits
from zimage_runtime.pipeline import ImageEvent, Pipeline

PLACES = (0.0, 0.1, 0.5, 0.9)
"""Quantiles that the table gives."""

WAYS = {"cpu": CPU, "cuda, int8 products": CUDA, "cuda, weight-only": CUDA_WEIGHT_ONLY, "cuda, blocks": CUDA_BLOCKS}


def pipelines(work: Path, device: str) -> tuple[Pipeline, dict[str, Pipeline]]:
    """The float32 one, and an int8 one for each way to compute."""
    bundles = {}
    for precision in (Precision.FP32, Precision.INT8):
        bundles[precision] = work / f"demo-{precision.value}"
        build("tiny", bundles[precision], BuildOptions(precision=precision, force=True), Progress())
    int8, ways = bundles[Precision.INT8], {}
    for name, program in WAYS.items():
        if program == CPU:
            ways[name] = Pipeline.from_bundle(int8, CPU)
            continue
        opened = Bundle.open(int8)
        made = cuda_executor(opened, budget=1 << 34, device=OrtDevice(device), denoiser=program)
        ways[name] = Pipeline.on(opened, made)
    return Pipeline.from_bundle(bundles[Precision.FP32], CPU), ways


def generated(pipeline: Pipeline, prompt: str, seed: int) -> ImageEvent:
    """One image, with its latents."""
    *_, last = pipeline.stream(prompt, seed=seed)
    assert isinstance(last, ImageEvent)
    return last


def run(work: Path, prompts: int, device: str) -> dict[str, Any]:
    """PSNR and the error of the latents of each image, by the way that it was computed."""
    reference, ways = pipelines(work, device)
    psnr: dict[str, list[float]] = {name: [] for name in ways}
    latents: dict[str, list[float]] = {name: [] for name in ways}
    for seed, (_, prompt) in enumerate(held_out_requests("en", prompts)):
        expected = generated(reference, prompt, seed)
        for name, pipeline in ways.items():
            found = generated(pipeline, prompt, seed)
            psnr[name].append(psnr_db(np.asarray(found.image), np.asarray(expected.image)))
            latents[name].append(relative_error(found.latents, expected.latents))
    return {
        "machine": machine("numpy", "onnxruntime", "onnxruntime-gpu"),
        "device": device,
        "activation_bits": activation_bits(),
        "psnr_db": psnr,
        "latents_error": latents,
    }


def report(document: dict[str, Any]) -> str:
    """The table, and where it comes from."""
    rows = []
    for name, values in document["psnr_db"].items():
        quantiles = [f"{np.quantile(values, place):.1f}" for place in PLACES]
        rows.append([name, *quantiles, f"{np.median(document['latents_error'][name]):.4f}"])
    head = ["programs", "least", "10 %", "median", "90 %", "latents, median relative error"]
    where = "a GPU" if document["device"] == "cuda" else "the CPU"
    count = len(next(iter(document["psnr_db"].values())))
    return (
        "# Demo model in int8: CUDA's programs beside the CPU's\n\n"
        f"PSNR in dB of {count} images against the fp32 bundle's; CUDA's programs ran on {where}, the CPU's have "
        f"activations of {document['activation_bits']} bits. {describe(document['machine'])}.\n"
        "Made by `PYTHONPATH=. python benchmarks/demo_int8_cuda.py`.\n\n" + markdown_table(head, rows)
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the bundles are put")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    document = run(options.work, options.prompts, options.device)
    write_results("demo_int8_cuda", document, report(document), options.out)
    print(report(document))


if __name__ == "__main__":
    main()
