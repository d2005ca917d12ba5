"""What a lower precision does to the demo model's pictures: what they show, and how far they are from float32's.

    PYTHONPATH=. python benchmarks/demo_precisions.py --work DIR [--prompts 400]

The same held-out prompts and seeds are drawn by a bundle of each precision and judged as in `demo_scores.py`. PSNR is
against the float32 bundle's picture. A sheet shows pictures side by side, from the one that int8 changed most to the
one it changed least.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, describe, machine, markdown_table, write_results
from demo_scores import LANGUAGES
from numpy.typing import NDArray
from PIL import Image

from demo_model.checker import judge, see
from demo_model.scenes import Language, Scene
from demo_model.scoring import held_out_requests, summary
from zimage_export.build import BuildOptions, build
from zimage_rt import Pipeline
from zimage_rt.bench.accuracy import psnr_db
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.machine.int8_products import activation_bits

Pictures = list[NDArray[np.uint8]]

REFERENCE = Precision.FP32
PRECISIONS = (REFERENCE, Precision.INT8, Precision.INT4)  # bf16 is what the checkpoint itself is stored in
SHARES = ("colour", "shape", "position")
PLACES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Quantiles that the table gives."""

SHEET_PLACES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Quantiles of int8's PSNR whose pictures the sheet shows."""


def main() -> None:
    """Builds, draws, judges, and writes the report and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the bundles are put")
    parser.add_argument("--prompts", type=int, default=400, help="for each language")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    requests = {language: held_out_requests(language, options.prompts) for language in LANGUAGES}
    every = [request for one in requests.values() for request in one]
    pictures = {precision: drawn(options.work, precision, every) for precision in PRECISIONS}
    report = compare(requests, pictures)
    write_results("demo_precisions", report, to_markdown(report), options.out)
    sheet(pictures).save(options.out / "demo_precisions.png", optimize=True)
    print(to_markdown(report))


def drawn(work: Path, precision: Precision, requests: Sequence[tuple[Scene, str]]) -> Pictures:
    """A picture [128, 128, 3] for each request, with its place in the sequence as the seed."""
    bundle = work / f"demo-{precision.value}"
    build("tiny", bundle, BuildOptions(precision=precision, force=True), Progress())
    pipeline = Pipeline.from_bundle(bundle)
    try:
        return [np.asarray(pipeline.generate(p, seed=seed).images[0]) for seed, (_, p) in enumerate(requests)]
    finally:
        pipeline.release()


def compare(requests: dict[Language, list[tuple[Scene, str]]], pictures: dict[Precision, Pictures]) -> dict[str, Any]:
    """Scores by precision and language, and the distribution of PSNR against float32."""
    scores: dict[str, dict[str, Any]] = {}
    for precision, drawn_ones in pictures.items():
        rest = iter(drawn_ones)
        scores[precision.value] = {
            LANGUAGES[language]: asdict(summary([judge(scene, see(next(rest))) for scene, _ in one]))
            for language, one in requests.items()
        }
    return {
        "machine": machine("numpy", "onnxruntime", "pillow"),
        "activation_bits": activation_bits(),
        "prompts": {LANGUAGES[language]: len(one) for language, one in requests.items()},
        "scores": scores,
        "psnr_db": {
            precision.value: [round(v, 2) if np.isfinite(v) else None for v in psnrs(pictures, precision)]
            for precision in pictures
            if precision is not REFERENCE
        },
    }


def psnrs(pictures: dict[Precision, Pictures], precision: Precision) -> list[float]:
    """Of each picture against float32's; infinite where they are identical."""
    pairs = zip(pictures[precision], pictures[REFERENCE], strict=True)
    return [psnr_db(picture, reference) for picture, reference in pairs]


def sheet(pictures: dict[Precision, Pictures]) -> Image.Image:
    """A row for each precision; columns by the PSNR of int8, the worst first."""
    order = np.argsort(psnrs(pictures, Precision.INT8))
    columns = [int(order[round(place * (len(order) - 1))]) for place in SHEET_PLACES]
    gap = 6
    height, width, _ = pictures[REFERENCE][0].shape
    shape = (len(pictures) * (height + gap) - gap, len(columns) * (width + gap) - gap, 3)
    canvas = np.full(shape, 255, np.uint8)
    for row, ones in enumerate(pictures.values()):
        for column, index in enumerate(columns):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = ones[index]
    return Image.fromarray(canvas)


def to_markdown(report: dict[str, Any]) -> str:
    """Both tables, and where they come from."""
    reference = report["scores"][REFERENCE.value]
    score_rows = [
        [precision, language, *(_share(one[share], reference[language][share]) for share in SHARES)]
        for precision, languages in report["scores"].items()
        for language, one in languages.items()
    ]
    psnr_rows = []
    for precision, values in report["psnr_db"].items():
        ordered = np.sort([np.inf if value is None else value for value in values])
        places = [float(ordered[round(place * (len(ordered) - 1))]) for place in PLACES]
        psnr_rows.append([precision, len(ordered), *(f"{one:.1f}" if np.isfinite(one) else "same" for one in places)])
    prompts = next(iter(report["prompts"].values()))
    return (
        "# Demo model: what a lower precision changes\n\n"
        f"{prompts} held-out prompts in each language, the same seeds for all. In brackets: points against fp32.\n\n"
        f"{markdown_table(['precision', 'prompts', 'colours', 'shapes', 'position'], score_rows)}\n\n"
        "PSNR of the picture against the fp32 bundle's, same prompt and seed, in dB:\n\n"
        f"{markdown_table(['precision', 'pictures', 'least', '10 %', 'median', '90 %', 'most'], psnr_rows)}\n\n"
        f"![Pictures side by side](demo_precisions.png)\n\nRows: {', '.join(report['scores'])}. Columns: int8's PSNR "
        f"rises from left to right (least, 1, 10, 25, 50, 75, 90 %, most).\n\n"
        f"`PYTHONPATH=. python benchmarks/demo_precisions.py --work DIR --prompts {prompts}`; "
        f"integer products with activations of {report['activation_bits']} bits; {describe(report['machine'])}\n"
    )


def _share(value: float, reference: float) -> str:
    return f"{100 * value:.1f} % ({100 * (value - reference):+.1f})"


if __name__ == "__main__":
    main()
