"""How far a small model of random weights is from diffusers in float32, in each precision: what `verify` measures.

    PYTHONPATH=.:tests python benchmarks/small_precisions.py --work DIR

Two images (an English and a Chinese prompt), 8 steps. The same in int8 with channels 50 times as loud as the rest,
with rebalancing and without.
"""

from pathlib import Path

from checkpoint_tools import with_loud_channels
from int8_variants import Measured, Variant, built

from zimage_export.errors import ExportError
from zimage_export.measure.verify import verify
from zimage_export.synthetic.checkpoint import SMALL
from zimage_rt.bench.script import Document, Run, Script
from zimage_rt.bench.synthetic import prepared
from zimage_rt.bench.tables import column_table
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.precision import Precision
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.machine.int8_products import activation_bits


def parity(bundle: Path, checkpoint: Path) -> Document:
    """Latents and image against the checkpoint in float32; what is beyond the precision's gate is measured, too."""
    try:
        verify(Bundle.open(bundle), checkpoint, Progress(quiet=True))
    except ExportError:
        if Bundle.open(bundle).manifest.parity is None:
            raise
    found = Bundle.open(bundle).manifest.parity
    assert found is not None
    return dict(found)


def measure(run: Run) -> Document:
    """Every precision, then int8 with loud channels."""
    rows = []
    for precision in Precision:
        checkpoint, bundle = prepared(run.work, "small", SMALL, precision.value)
        rows.append({"bundle": precision.value, **parity(bundle, checkpoint)})
    loud = run.work / "loud"
    if not loud.exists():
        with_loud_channels(checkpoint, loud)
    for name, rebalanced in {"int8, loud channels": True, "int8, loud channels, not rebalanced": False}.items():
        built(loud, run.work / name, Variant(name, rebalanced=rebalanced), Measured({}, {}))
        rows.append({"bundle": name, **parity(run.work / name, loud)})
    return {"activation_bits": activation_bits(), "rows": rows}


def page(document: Document) -> list[str]:
    """One row for each bundle."""
    first = document["rows"][0]
    columns = {
        "bundle": "{bundle}",
        "latents, relative error": "{latents:.1e}",
        "image, dB": "{picture[psnr_db]:.1f}",
        "largest difference of a pixel, 1/255": "{picture[max_difference]}",
    }
    return [
        "A small model against diffusers in float32",
        f"Random weights, {first['prompts']} images of {first['size']}, {first['steps']} steps, the worse of them. "
        f"Activations of int8 have {document['activation_bits']} bits.",
        column_table(columns, document["rows"]),
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime", "torch", "diffusers", "transformers"),
    work="50 MB",
    path=".:tests",
)

if __name__ == "__main__":
    SCRIPT.main()
