"""Does the demo model draw what it is asked for? Held-out prompts, judged by plain image analysis.

    PYTHONPATH=. python benchmarks/demo_scores.py [--bundle DIR] [--prompts 400]

Every prompt asks for a pair of colour and shape that no training picture showed. The same requests are also judged
against pictures drawn from the empty prompt: that is chance. The report of another bundle than the one that ships is
named after its precision.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, describe, machine, markdown_table, write_results
from numpy.typing import NDArray

from demo_model.scenes import Language
from demo_model.scoring import Scores, held_out_requests, score
from zimage_rt import Pipeline, demo_bundle

LANGUAGES: dict[Language, str] = {"en": "English", "zh": "Chinese"}


def main() -> None:
    """Draws, judges, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="the one that ships, unless given")
    parser.add_argument("--prompts", type=int, default=400, help="for each language")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = measure(Pipeline.from_bundle(options.bundle or demo_bundle()), options.prompts)
    name = f"demo_scores_{report['precision']}" if options.bundle else "demo_scores"
    write_results(name, report, to_markdown(report), options.out)
    print(to_markdown(report))


def measure(pipeline: Pipeline, prompts: int) -> dict[str, Any]:
    """The scores of both languages, with their prompts and without."""

    def draw(prompt: str, seed: int) -> NDArray[np.uint8]:
        return np.asarray(pipeline.generate(prompt, seed=seed).images[0])

    scores: dict[str, Scores] = {}
    for language, name in LANGUAGES.items():
        requests = held_out_requests(language, prompts)
        scores[name] = score(requests, draw)
        scores[f"{name}, drawn from the empty prompt"] = score([(scene, "") for scene, _ in requests], draw)
    manifest = pipeline.bundle.manifest
    return {
        "precision": manifest.precision.value,
        "fingerprint": manifest.fingerprint,
        "machine": machine("numpy", "onnxruntime", "pillow"),
        "scores": {name: asdict(one) for name, one in scores.items()},
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The table, and where it comes from."""
    rows = [
        [
            name,
            one["prompts"],
            *(f"{100 * one[share]:.1f} %" for share in ("colour", "shape", "pairs", "position")),
            one["positioned"],
        ]
        for name, one in report["scores"].items()
    ]
    header = ["prompts", "number", "colours", "shapes", "each shape in its colour", "position", "prompts that tell it"]
    count = rows[0][1]
    return (
        "# Demo model: what was asked for, and what was drawn\n\n"
        f"{markdown_table(header, rows)}\n"
        "A picture counts as right where all its objects are, and no others.\n\n"
        f"`PYTHONPATH=. python benchmarks/demo_scores.py --prompts {count}`, {report['precision']} bundle "
        f"{report['fingerprint'][:12]}; {describe(report['machine'])}\n"
    )


if __name__ == "__main__":
    main()
