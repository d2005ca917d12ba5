"""Does the demo model generate what a prompt asks for? Held-out prompts, judged by plain image analysis.

    PYTHONPATH=. python benchmarks/demo_scores.py [--bundle DIR] [--prompts 400]

Every prompt asks for a pair of colour and shape that no training image showed. The same requests are also judged
against images generated from the empty prompt: that is chance.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from demo_images import LANGUAGES

from demo_model.scoring import Scores, held_out_requests, score
from zimage_rt import Pipeline, demo_bundle
from zimage_rt.bench.accuracy import Pixels
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.tables import Column, column_table


def measure(run: Run) -> Document:
    """The scores of both languages, with their prompts and without."""
    pipeline = Pipeline.from_bundle(run.options.bundle or demo_bundle())

    def generate(prompt: str, seed: int) -> Pixels:
        return np.asarray(pipeline.generate(prompt, seed=seed).images[0])

    scores: dict[str, Scores] = {}
    for language, name in LANGUAGES.items():
        requests = held_out_requests(language, run.options.prompts)
        scores[name] = score(requests, generate)
        scores[f"{name}, the empty prompt"] = score([(scene, "") for scene, _ in requests], generate)
    manifest = pipeline.bundle.manifest
    return {
        "precision": manifest.precision.value,
        "fingerprint": manifest.fingerprint,
        "scores": {name: asdict(one) for name, one in scores.items()},
    }


def share(key: str) -> Column:
    """A column in percent."""
    return lambda row: f"{100 * row[key]:.1f} %"


def page(report: Document) -> list[str]:
    """The table."""
    shares = {"colours": "colour", "shapes": "shape", "each shape in its colour": "pairs", "position": "position"}
    columns: dict[str, Column] = {"prompts": "{name}", "number": "{prompts}"}
    columns |= {title: share(key) for title, key in shares.items()} | {"prompts that give a position": "{positioned}"}
    return [
        "Demo model: what was asked for, and what was generated",
        column_table(columns, [{"name": name, **one} for name, one in report["scores"].items()]),
        "An image counts as right if all its objects are, and no others. "
        f"The {report['precision']} bundle {report['fingerprint'][:12]}.",
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime", "pillow"),
    path=".",
    options={
        "bundle": Option(None, "the one that ships, unless given", kind=Path),
        "prompts": Option(400, "for each language"),
    },
)

if __name__ == "__main__":
    SCRIPT.main()
