"""What int8 costs an image with LoRA, beside what it costs one without: PSNR on the demo model.

    PYTHONPATH=. python benchmarks/lora_precision.py --work DIR [--prompts 40] [--loras 2] [--sizes 0.02 0.05 0.15]

The same held-out prompts and seeds in fp32 and in int8, without and with LoRA of random values on every linear of the
transformer, which change the images. A LoRA's size is the norm of its change over the norm of the weight. PSNR is of
int8 against fp32. With each LoRA int8 stands twice: with branches beside its weights, and with the file merged before
the weights are rebalanced and rounded (`build --lora`).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, describe, machine, markdown_table, write_results
from numpy.typing import NDArray

from demo_model.scoring import held_out_requests
from zimage_export.build import BuildOptions, build
from zimage_export.programs import add_programs
from zimage_rt import Pipeline
from zimage_rt.bench.accuracy import psnr_db
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.stored_weights import PublishedRows
from zimage_runtime.bundle.tensors import DType, encode_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.machine.int8_products import activation_bits
from zimage_runtime.model.branches import EXTENDED, branch_linears

RANK = 8
WITHOUT = "int8 without LoRA"
KINDS = ("int8 with branches", "int8 of the merged model", "fp32 with it against fp32 without")
Images = list[NDArray[np.uint8]]


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


def generated(root: Path, prompts: list[str], loras: list[Path]) -> Images:
    """An image of each prompt."""
    with Pipeline.from_bundle(root, "cpu") as pipeline:
        return [np.asarray(pipeline.generate(p, seed=seed, loras=loras).images[0]) for seed, p in enumerate(prompts)]


def built(root: Path, precision: Precision, loras: tuple[GivenLora, ...] = ()) -> Bundle:
    """A bundle of the demo model, with the programs that take LoRA."""
    bundle = build("tiny", root, BuildOptions(precision=precision, loras=loras, force=True), Progress(quiet=True))
    return add_programs(bundle, ("cpu",), lora=True).bundle


def psnrs(images: Images, others: Images) -> list[float]:
    """Of each image against the other one."""
    return [psnr_db(one, other) for one, other in zip(images, others, strict=True)]


def main() -> None:
    """Builds, generates and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the bundles are put")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--loras", type=int, default=2, help="files of other random values, of each size")
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.02, 0.05, 0.15], help="of a change, over its weight"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prompts = [prompt for _, prompt in held_out_requests("en", options.prompts)]
    fp32, int8 = (built(options.work / f"demo-{p.value}", p) for p in (Precision.FP32, Precision.INT8))
    plain = generated(fp32.root, prompts, [])
    rows = {WITHOUT: psnrs(generated(int8.root, prompts, []), plain)}
    for size in options.sizes:
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for seed in range(options.loras):
            path = write_lora(options.work / f"random-{size}-{seed}.safetensors", fp32, seed, size)
            merged = built(options.work / "demo-merged", Precision.INT8, (GivenLora(str(path)),))
            changed = generated(fp32.root, prompts, [path])
            images = generated(int8.root, prompts, [path]), generated(merged.root, prompts, [])
            for kind, psnr in zip(
                KINDS, (*(psnrs(one, changed) for one in images), psnrs(changed, plain)), strict=True
            ):
                found[kind] += psnr
        rows |= {f"LoRA of {size:.0%}: {kind}": values for kind, values in found.items()}
        print({name: round(float(np.median(values)), 2) for name, values in rows.items()}, flush=True)
    document: dict[str, Any] = {
        "machine": machine("numpy", "onnxruntime", "pillow"),
        "activation_bits": activation_bits(),
        "prompts": len(prompts),
        "psnr_db": {name: [round(value, 2) for value in values] for name, values in rows.items()},
    }
    table = [
        [name, f"{min(values):.1f}", f"{np.median(values):.2f}", f"{max(values):.1f}"] for name, values in rows.items()
    ]
    options_text = f"--prompts {len(prompts)} --loras {options.loras} --sizes {' '.join(map(str, options.sizes))}"
    text = (
        "# int8 with LoRA\n\n"
        f"{len(prompts)} held-out prompts of the demo model, the same seeds for all; for each size {options.loras} "
        f"LoRA of rank {RANK} and random values on every linear of the transformer. A size is the norm of the change "
        "over the norm of the weight. PSNR in dB, of int8 against fp32 with the same LoRA. What int8 loses more with a "
        "LoRA than without is the difference of the medians.\n\n"
        f"{markdown_table(['images', 'least', 'median', 'most'], table)}\n\n"
        f"`PYTHONPATH=. python benchmarks/lora_precision.py --work DIR {options_text}`; integer products with "
        f"activations of {document['activation_bits']} bits; {describe(document['machine'])}\n"
    )
    write_results("lora_precision", document, text, options.out)
    print(text)


if __name__ == "__main__":
    main()
