"""What int8 costs an image with LoRA, beside what it costs one without: PSNR on the demo model.

    PYTHONPATH=. python benchmarks/lora_precision.py --work DIR [--prompts 40] [--loras 2] [--sizes 0.02 0.05 0.15]

The same held-out prompts and seeds in fp32 and in int8, without and with LoRA of random values on every linear of the
transformer, which change the images. A LoRA's size is the norm of its change over the norm of the weight. PSNR is of
int8 against fp32. With each LoRA int8 stands twice: with branches beside its weights, and with the file merged before
the weights are rebalanced and rounded (`build --lora`).
"""

from pathlib import Path

import numpy as np
from demo_images import demo_bundle_in, generated, prompts, psnrs

from zimage_export.build import BuildOptions, build
from zimage_export.programs import add_programs
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.tables import markdown_table
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.precision import Precision
from zimage_runtime.bundle.stored_weights import PublishedRows
from zimage_runtime.bundle.tensors import DType, encode_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.machine.int8_products import activation_bits
from zimage_runtime.model.branches import EXTENDED, branch_linears

RANK = 8
WITHOUT = "int8 without LoRA"
KINDS = ("int8 with branches", "int8 of the merged model", "fp32 with it against fp32 without")


def write_lora(path: Path, bundle: Bundle, seed: int, size: float) -> Path:
    """A change of random values of every linear, `size` times as large as its weight."""
    rng, tensors = np.random.default_rng(seed), {}
    published = PublishedRows(bundle, "transformer")
    for program in EXTENDED:
        for linear in branch_linears(program, bundle.manifest.config):
            name = f"diffusion_model.{linear.name}"
            down, up = rng.standard_normal((RANK, linear.in_width)), rng.standard_normal((linear.out_width, RANK))
            norm = np.linalg.norm(published.rows(linear.name, 0, linear.out_width))
            up *= size * norm / np.linalg.norm(up @ down)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    with path.open("wb") as file:
        file.write(encode_header({name: (DType.F32, value.shape) for name, value in tensors.items()}))
        for value in tensors.values():
            file.write(value.astype("<f4").tobytes())
    return path


def measure(run: Run) -> Document:
    """Images without and with the LoRA, in both precisions, and of merged models."""
    texts = prompts(run.options.prompts, ["en"])
    fp32, int8 = (
        add_programs(Bundle.open(demo_bundle_in(run.work, precision)), ("cpu",), lora=True).bundle
        for precision in (Precision.FP32, Precision.INT8)
    )
    plain = generated(fp32.root, texts)
    found = {WITHOUT: psnrs(generated(int8.root, texts), plain)}
    for size in run.options.sizes:
        of_size: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for seed in range(run.options.loras):
            path = write_lora(run.work / f"random-{size}-{seed}.safetensors", fp32, seed, size)
            merged = build(
                "tiny",
                run.work / "demo-merged",
                BuildOptions(precision=Precision.INT8, loras=(GivenLora(str(path)),), force=True),
                Progress(quiet=True),
            )
            changed = generated(fp32.root, texts, loras=[path])
            pairs = (
                (generated(int8.root, texts, loras=[path]), changed),
                (generated(merged.root, texts), changed),
                (changed, plain),
            )
            for kind, (images, others) in zip(KINDS, pairs, strict=True):
                of_size[kind] += psnrs(images, others)
        found |= {f"LoRA of {size:.0%}: {kind}": values for kind, values in of_size.items()}
        run.note({name: round(float(np.median(values)), 2) for name, values in found.items()})
    rounded = {name: [round(value, 2) for value in values] for name, values in found.items()}
    return {
        "activation_bits": activation_bits(),
        "prompts": len(texts),
        "loras": run.options.loras,
        "psnr_db": rounded,
    }


def page(document: Document) -> list[str]:
    """One row for each pair."""
    rows = [
        [name, f"{min(values):.1f}", f"{np.median(values):.2f}", f"{max(values):.1f}"]
        for name, values in document["psnr_db"].items()
    ]
    return [
        "int8 with LoRA",
        f"{document['prompts']} held-out prompts of the demo model, the same seeds for all; for each size "
        f"{document['loras']} LoRA of rank {RANK} and random values on every linear of the transformer. A size is the "
        "norm of the change over the norm of the weight. PSNR in dB, of int8 against fp32 with the same LoRA. What "
        "int8 loses more with a LoRA than without is the difference of the medians.",
        markdown_table(["images", "least", "median", "most"], rows),
        f"Integer products with activations of {document['activation_bits']} bits.",
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    work="200 MB",
    packages=("numpy", "onnxruntime", "pillow"),
    path=".",
    options={
        "prompts": Option(40, "held-out prompts"),
        "loras": Option(2, "files of other random values, of each size"),
        "sizes": Option([0.02, 0.05, 0.15], "of a change, over its weight"),
    },
)

if __name__ == "__main__":
    SCRIPT.main()
