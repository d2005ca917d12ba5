"""How far int8 images of the demo model are from float32's: the CPU's programs, and both kinds of CUDA's.

    PYTHONPATH=. python benchmarks/demo_int8_cuda.py --work DIR [--prompts 24] [--device cuda]

CUDA's programs run on the CPU unless a GPU is named. One image says little: where a prompt is near a decision of the
model, any perturbation changes what is generated, so the table gives quantiles over many.
"""

from pathlib import Path

import numpy as np
from demo_images import demo_bundle_in, prompts, quantiles

from zimage_rt.bench.accuracy import psnr_db, relative_error
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.tables import markdown_table
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY
from zimage_runtime.bundle.precision import Precision
from zimage_runtime.executors.ort.cuda import cuda_executor
from zimage_runtime.executors.ort.device import OrtDevice
from zimage_runtime.machine.int8_products import activation_bits
from zimage_runtime.pipeline import ImageEvent, Pipeline

PLACES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9}
WAYS = {"cpu": CPU, "cuda, int8 products": CUDA, "cuda, weight-only": CUDA_WEIGHT_ONLY, "cuda, blocks": CUDA_BLOCKS}


def pipeline_of(bundle: Path, program: str, device: str) -> Pipeline:
    """An int8 bundle, computed in one of the ways."""
    if program == CPU:
        return Pipeline.from_bundle(bundle, CPU)
    opened = Bundle.open(bundle)
    return Pipeline.on(opened, cuda_executor(opened, budget=1 << 34, device=OrtDevice(device), denoiser=program))


def generated(pipeline: Pipeline, prompt: str, seed: int) -> ImageEvent:
    """One image, with its latents."""
    *_, last = pipeline.stream(prompt, seed=seed)
    assert isinstance(last, ImageEvent)
    return last


def measure(run: Run) -> Document:
    """PSNR and the error of the latents of each image, by the way that it was computed."""
    device, int8 = run.options.device, demo_bundle_in(run.work, Precision.INT8)
    reference = Pipeline.from_bundle(demo_bundle_in(run.work, Precision.FP32), CPU)
    ways = {name: pipeline_of(int8, program, device) for name, program in WAYS.items()}
    psnr: dict[str, list[float]] = {name: [] for name in ways}
    latents: dict[str, list[float]] = {name: [] for name in ways}
    for seed, prompt in enumerate(prompts(run.options.prompts, ["en"])):
        expected = generated(reference, prompt, seed)
        for name, pipeline in ways.items():
            found = generated(pipeline, prompt, seed)
            psnr[name].append(psnr_db(np.asarray(found.image), np.asarray(expected.image)))
            latents[name].append(relative_error(found.latents, expected.latents))
    return {"device": device, "activation_bits": activation_bits(), "psnr_db": psnr, "latents_error": latents}


def page(document: Document) -> list[str]:
    """One row for each way."""
    rows = [
        [name, *quantiles(values, list(PLACES.values())), f"{np.median(document['latents_error'][name]):.4f}"]
        for name, values in document["psnr_db"].items()
    ]
    where = "a GPU" if document["device"] == "cuda" else "the CPU"
    return [
        "Demo model in int8: CUDA's programs beside the CPU's",
        f"PSNR in dB of {len(next(iter(document['psnr_db'].values())))} images against the fp32 bundle's; CUDA's "
        f"programs ran on {where}, the CPU's have activations of {document['activation_bits']} bits.",
        markdown_table(["programs", *PLACES, "latents, median relative error"], rows),
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime", "onnxruntime-gpu"),
    work="100 MB",
    path=".",
    options={"prompts": Option(24, "in English"), "device": Option("cpu", "of CUDA's programs", ("cpu", "cuda"))},
)

if __name__ == "__main__":
    SCRIPT.main()
