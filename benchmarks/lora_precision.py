"""What int8 costs an image with LoRA, beside what it costs one without: PSNR on the demo model.

    PYTHONPATH=. python benchmarks/lora_precision.py --work DIR [--prompts 40]

The same held-out prompts and seeds, each generated four times: in fp32 and in int8, without and with a LoRA of random
values on every linear of the transformer, which changes the images. PSNR is of int8 against fp32.
"""

import numpy as np
from demo_images import Images, demo_bundle_in, generated, prompts, psnrs

from zimage_export.programs import add_programs
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.synthetic import random_lora
from zimage_rt.bench.tables import markdown_table
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.precision import Precision
from zimage_runtime.machine.int8_products import activation_bits

RANK, SCALE = 8, 0.15  # the size of a strong LoRA's changes


def measure(run: Run) -> Document:
    """Images without and with the LoRA, in both precisions."""
    texts, images = prompts(run.options.prompts, ["en"]), {}
    for precision in (Precision.FP32, Precision.INT8):
        bundle = add_programs(Bundle.open(demo_bundle_in(run.work, precision)), ("cpu",), lora=True).bundle
        lora = random_lora(run.work / "random.safetensors", bundle.manifest.config, RANK, SCALE)
        pair: tuple[Images, Images] = (generated(bundle.root, texts), generated(bundle.root, texts, loras=[lora]))
        images[precision] = pair
    (plain, changed), (int8_plain, int8_changed) = images.values()
    found = {
        "int8 against fp32, without": psnrs(int8_plain, plain),
        "int8 against fp32, both with the LoRA": psnrs(int8_changed, changed),
        "fp32 with the LoRA against fp32 without": psnrs(changed, plain),
    }
    rounded = {name: [round(value, 2) for value in values] for name, values in found.items()}
    return {"activation_bits": activation_bits(), "prompts": len(texts), "psnr_db": rounded}


def page(document: Document) -> list[str]:
    """One row for each comparison."""
    rows = [
        [name, f"{min(values):.1f}", f"{np.median(values):.1f}", f"{max(values):.1f}"]
        for name, values in document["psnr_db"].items()
    ]
    return [
        "int8 with LoRA",
        f"{document['prompts']} held-out prompts of the demo model, the same seeds for all; a LoRA of rank {RANK} and "
        "random values on every linear of the transformer. PSNR in dB.",
        markdown_table(["images", "least", "median", "most"], rows),
        f"Integer products have activations of {document['activation_bits']} bits.",
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime", "pillow"),
    work="100 MB",
    path=".",
    options={"prompts": Option(40, "in English")},
)

if __name__ == "__main__":
    SCRIPT.main()
