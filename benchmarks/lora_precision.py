"""What int8 costs an image with LoRA, beside what it costs one without: PSNR on the demo model.

    PYTHONPATH=. python benchmarks/lora_precision.py --work DIR [--prompts 40]

The same held-out prompts and seeds, each generated four times: in fp32 and in int8, without and with a LoRA of random
values on every linear of the transformer, which changes the images. PSNR is of int8 against fp32.
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
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.tensors import DType, encode_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.machine.int8_products import activation_bits
from zimage_runtime.model.branches import EXTENDED, branch_linears

RANK, SCALE = 8, 0.15
Images = list[NDArray[np.uint8]]


def write_lora(path: Path, bundle: Bundle) -> Path:
    """A change of every linear: of the size of a strong LoRA's, but of random values."""
    rng, tensors = np.random.default_rng(0), {}
    for program in EXTENDED:
        for linear in branch_linears(program, bundle.manifest.config):
            name = f"diffusion_model.{linear.name}"
            down = rng.standard_normal((RANK, linear.in_width)) / linear.in_width**0.5
            up = rng.standard_normal((linear.out_width, RANK)) * SCALE / RANK**0.5
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    with path.open("wb") as file:
        file.write(encode_header({name: (DType.F32, value.shape) for name, value in tensors.items()}))
        for value in tensors.values():
            file.write(value.astype("<f4").tobytes())
    return path


def generated(work: Path, precision: Precision, prompts: list[str]) -> tuple[Images, Images]:
    """An image of each prompt, without and with the LoRA."""
    root = work / f"demo-{precision.value}"
    bundle = build("tiny", root, BuildOptions(precision=precision, force=True), Progress())
    bundle = add_programs(bundle, ("cpu",), lora=True).bundle
    loras = [write_lora(work / "random.safetensors", bundle)]
    with Pipeline.from_bundle(root, "cpu") as pipeline:
        plain = [np.asarray(pipeline.generate(p, seed=seed).images[0]) for seed, p in enumerate(prompts)]
        changed = [np.asarray(pipeline.generate(p, seed=seed, loras=loras).images[0]) for seed, p in enumerate(prompts)]
    return plain, changed


def psnrs(images: Images, others: Images) -> list[float]:
    """Of each image against the other one."""
    return [psnr_db(one, other) for one, other in zip(images, others, strict=True)]


def main() -> None:
    """Builds, generates and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the bundles are put")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prompts = [prompt for _, prompt in held_out_requests("en", options.prompts)]
    plain, changed = generated(options.work, Precision.FP32, prompts)
    int8_plain, int8_changed = generated(options.work, Precision.INT8, prompts)
    rows = {
        "int8 against fp32, without": psnrs(int8_plain, plain),
        "int8 against fp32, both with the LoRA": psnrs(int8_changed, changed),
        "fp32 with the LoRA against fp32 without": psnrs(changed, plain),
    }
    document: dict[str, Any] = {
        "machine": machine("numpy", "onnxruntime", "pillow"),
        "activation_bits": activation_bits(),
        "prompts": len(prompts),
        "psnr_db": {name: [round(value, 2) for value in values] for name, values in rows.items()},
    }
    table = [
        [name, f"{min(values):.1f}", f"{np.median(values):.2f}", f"{max(values):.1f}"] for name, values in rows.items()
    ]
    text = (
        "# int8 with LoRA\n\n"
        f"{len(prompts)} held-out prompts of the demo model, the same seeds for all; a LoRA of rank {RANK} and random "
        "values on every linear of the transformer. PSNR in dB.\n\n"
        f"{markdown_table(['images', 'least', 'median', 'most'], table)}\n\n"
        f"`PYTHONPATH=. python benchmarks/lora_precision.py --work DIR --prompts {len(prompts)}`; integer "
        f"products with activations of {document['activation_bits']} bits; {describe(document['machine'])}\n"
    )
    write_results("lora_precision", document, text, options.out)
    print(text)


if __name__ == "__main__":
    main()
