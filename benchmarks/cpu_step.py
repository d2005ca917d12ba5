"""One denoising step and one whole image on the CPU: ours in fp32, int8 and int4 against diffusers, as ratios.

The model has a few blocks of the published width, each with weights of its own (ONNX Runtime shares equal ones), so
that they do not fit in a cache. Variants take turns, and a ratio is of two calls in the same round. Torch gets as many
threads as we use. An output that is not finite, or further from diffusers in float32 than its type explains, marks its
variant failed. Beside the step stands what its operations take at this processor's matrix rate, and for int8 where the
rest of the time goes, by operator, from ONNX Runtime's profile.

    python benchmarks/cpu_step.py --work DIR
    python benchmarks/cpu_step.py --work DIR --layers 8 --variants "ours fp32" "ours int8" "ours int4" --name int8_step
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.steps import PROMPT, SEED, Call, Calls, diffusers_pipelines, diffusers_steps, judged, our_step
from zimage_rt.bench.steps import step_profile as profile
from zimage_rt.bench.synthetic import few_blocks, prepared
from zimage_rt.bench.tables import Column, column_table
from zimage_rt.bench.timing import interleave, ratio
from zimage_runtime.arrays import FloatArray

FP32, INT8, INT4 = "ours fp32", "ours int8", "ours int4"
EAGER, COMPILED = "diffusers eager fp32", "diffusers compiled fp32"
VARIANTS = (FP32, INT8, INT4, EAGER, COMPILED, "diffusers eager bf16", "diffusers compiled bf16")
BOUNDS = {FP32: 1e-4, COMPILED: 1e-4, INT8: 0.2, INT4: 0.5} | dict.fromkeys(VARIANTS[5:], 0.1)
"""The relative error that still counts."""

_PRODUCTS = ("MatMulIntegerToFloat", "MatMulInteger")
OPTIONS = {
    "layers": Option(3, "main layers"),
    "variants": Option([FP32, *VARIANTS[3:]], "all of them take 20 GB of memory", VARIANTS),
    "image_rounds": Option(1, "of whole images of the first size"),
    "steps": Option(8, "of whole images"),
    "profile_runs": Option(3, "steps of int8 that are profiled; 0 for none"),
}


def measure(run: Run) -> Document:
    """Steps at each size, and whole images at the first."""
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.machine.cores import thread_count
    from zimage_runtime.machine.int8_products import activation_bits
    from zimage_runtime.pipeline import Pipeline

    from_torch = [name for name in run.options.variants if name.startswith("diffusers")]
    bundles: dict[str, Path] = {}
    checkpoint = run.work
    dimensions = scale("tiny" if run.trial else "real", run.options.layers)
    for name in (FP32, *run.options.variants):
        if name.startswith("ours"):
            kind = "step-trial" if run.trial else f"step-{run.options.layers}"
            checkpoint, bundles[name] = prepared(run.work, kind, dimensions, name.split()[1])
    transformer = Bundle.open(bundles[FP32]).manifest.config.transformer
    parts: list[Document] = []
    run.keep(
        main_layers=transformer.n_layers,
        refiners=transformer.n_refiner_layers,
        dim=transformer.dim,
        threads=thread_count(),
        activation_bits=activation_bits(),
        seconds_of="processor" if run.options.cpu_time else "wall clock",
        parts=parts,
    )
    pipelines, transformers = diffusers_pipelines(checkpoint, from_torch) if from_torch else ({}, {})
    for index, size in enumerate(run.sizes):
        ours = {name: Pipeline.from_bundle(path, "cpu", keep_loaded=False) for name, path in bundles.items()}
        steps = {name: our_step(pipeline, size) for name, pipeline in ours.items()}
        calls: Calls = {name: step.call for name, step in steps.items() if name in run.options.variants}
        calls |= diffusers_steps(transformers, steps[FP32])
        part = timed(run, "step", size, calls, run.rounds)
        parts.append(part | floors(bundles, size, steps[FP32].tokens, part, run))
        calls.clear()
        steps.clear()
        run.keep()
        if index == 0 and run.options.image_rounds:
            ours = {name: Pipeline.from_bundle(path, "cpu") for name, path in bundles.items()}
            images: Calls = {name: our_image(pipeline, size, run.options.steps) for name, pipeline in ours.items()}
            for name, network in transformers.items():
                images[name] = their_image(pipelines[name.split()[-1]], network, size, run.options.steps)
            parts.append(timed(run, "image", size, images, run.options.image_rounds))
            run.keep()
    return {}


def scale(name: str, layers: int) -> Any:
    """`real`: main layers and a refiner of the published width. `tiny`: the tests' small model."""
    from zimage_export.synthetic.checkpoint import SMALL

    return SMALL if name == "tiny" else few_blocks(layers, text_layers=3)


def timed(run: Run, what: str, size: tuple[int, int], calls: Calls, rounds: int) -> Document:
    """Runs each call once to judge its output, then all in turns: one row for each variant."""
    errors, failed = judged(calls, (EAGER, FP32), BOUNDS if what == "step" else {})
    seconds = interleave(calls, rounds, run.clock)

    def row(name: str) -> Document:
        taken = seconds[name]
        over = {other: ratio(taken, seconds[other]) for other in (FP32, INT8) if other in seconds}
        return {
            "rounds": len(taken),
            "median_seconds": statistics.median(taken),
            "least_seconds": min(taken),
            "over": {other: [each.least, each.median, each.most] for other, each in over.items()},
            "relative_error": errors.get(name),
        }

    rows = [
        {"variant": name, **(row(name) if name in seconds else {}), "failed": failed.get(name)}
        for name in (*seconds, *(name for name in failed if name not in seconds))
    ]
    return {"what": what, "size": f"{size[0]}x{size[1]}", "rows": rows}


def floors(bundles: dict[str, Path], size: tuple[int, int], tokens: int, part: Document, run: Run) -> Document:
    """What a step's operations take at the rate of large matrix products, and of int8 the profile."""
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.machine.matrix_rate import float_rate, integer_rate
    from zimage_runtime.model.geometry import image_geometry, padded
    from zimage_runtime.model.operations import step_operations

    config = Bundle.open(bundles[FP32]).manifest.config
    geometry = image_geometry(*size, config)
    operations, rate = step_operations(config, geometry, tokens), float_rate(clock=run.clock)
    found: Document = {
        "tokens": geometry.image_tokens + padded(tokens),
        "float_rate": rate,
        "floor_seconds": operations.total / rate,
    }
    if INT8 not in bundles:
        return found
    rate = integer_rate(clock=run.clock)
    floor, (taken,) = operations.linear / rate, [r["median_seconds"] for r in part["rows"] if r["variant"] == INT8]
    found |= {"integer_rate": rate, "integer_floor_seconds": floor, "integer_floor_of_step": floor / taken}
    if run.options.profile_runs:
        by_operator = profile(bundles[INT8], size, run.options.profile_runs)
        found["integer_floor_of_products"] = 1e3 * floor / sum(by_operator.get(name, 0.0) for name in _PRODUCTS)
        found["profile_ms"] = dict(sorted(by_operator.items(), key=lambda item: -item[1]))
    return found


def our_image(pipeline: Any, size: tuple[int, int], steps: int) -> Call:
    """A call that generates a whole image and gives its pixels, 0 to 255."""

    def call() -> FloatArray:
        pipeline.forget_prompt()
        return np.asarray(pipeline.generate(PROMPT, size=size, steps=steps, seed=SEED).images[0], np.float32)

    return call


def their_image(pipeline: Any, transformer: Any, size: tuple[int, int], steps: int) -> Call:
    """The same by diffusers, with one of its transformers."""
    import torch

    def call() -> FloatArray:
        pipeline.transformer, original = transformer, pipeline.transformer
        try:
            images = pipeline(
                PROMPT,
                width=size[0],
                height=size[1],
                num_inference_steps=steps,
                guidance_scale=0.0,
                generator=torch.Generator("cpu").manual_seed(SEED),
            ).images
        finally:
            pipeline.transformer = original
        return np.asarray(images[0], np.float32)

    return call


def page(document: Document) -> list[str]:
    """A table for each size."""
    parts = [
        "A step and an image on the CPU, against diffusers",
        f"Random weights, {document['main_layers']} main blocks and {document['refiners']} refiner of width "
        f"{document['dim']}{bits(document)}; variants take turns; {document['threads']} threads; seconds of the "
        f"{document['seconds_of']}.",
        "The error is against diffusers eager fp32, or our fp32 where that took no part: of the first step's velocity, "
        "or of an image's pixels. Seconds are of a machine that other work may share: compare ratios, which are "
        "medians over the rounds, with the least in brackets.",
    ]
    for part in document["parts"]:
        tokens = f": {part['tokens']} tokens" if "tokens" in part else ""
        others = {name for row in part["rows"] for name in row.get("over", ())}
        columns: dict[str, Column] = {"variant": "{variant}", "rounds": "{rounds}", "median, s": "{median_seconds:.3f}"}
        columns |= {f"over {name}": over(name) for name in (FP32, INT8) if name in others}
        parts += [f"## {part['what'].capitalize()} of {part['size']}{tokens}"]
        parts += [column_table(columns | {"relative error": error}, part["rows"]), floor_text(part)]
        if profiled := part.get("profile_ms"):
            whole = sum(profiled.values())
            shares = [{"name": n, "ms": ms, "share": 100 * ms / whole} for n, ms in profiled.items()]
            shown = {"operator": "{name}", "ms per step": "{ms:.1f}", "%": "{share:.1f}"}
            parts.append(column_table(shown, [share for share in shares if share["share"] > 0.2]))
    return parts


def bits(document: Document) -> str:
    """Of int8's activations, where int8 took part."""
    took_part = any(row["variant"] == INT8 for part in document["parts"] for row in part["rows"])
    return f"; activations of int8 have {document['activation_bits']} bits" if took_part else ""


def over(name: str) -> Column:
    """The column of times over another variant's."""

    def text(row: Document) -> str:
        each = row.get("over", {}).get(name)
        return f"{each[1]:.2f} ({each[0]:.2f})" if each and each[0] else f"{each[1]:.2f}" if each else "–"

    return text


def error(row: Document) -> str:
    """A variant's error, or why it failed."""
    found = [f"{row['relative_error']:.1e}"] if row.get("relative_error") is not None else []
    return ", ".join([*found, *([f"failed: {row['failed']}"] if row["failed"] else [])])


def floor_text(part: Document) -> str:
    """How near the step is to what the matrix rates allow."""
    text = []
    if "float_rate" in part:
        text.append(
            f"A large product of float32 matrices reaches {part['float_rate'] / 1e9:.0f} GFLOP/s; at that rate the "
            f"step takes {part['floor_seconds']:.2f} s."
        )
    if "integer_rate" in part:
        share = part.get("integer_floor_of_products")
        text.append(
            f"A large integer product reaches {part['integer_rate'] / 1e9:.0f} GOP/s; at that rate the step's integer "
            f"products take {part['integer_floor_seconds']:.2f} s: {100 * part['integer_floor_of_step']:.0f} % of the "
            f"step{f', {100 * share:.0f} % of the time in its integer products' if share else ''}."
        )
    return " ".join(text)


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime", "torch", "diffusers", "transformers"),
    work="12 GB, 20 with int8 and int4",
    rounds=5,
    sizes=("256x256", "512x512"),
    cpu_time=True,
    trial=True,
    options=OPTIONS,
)

if __name__ == "__main__":
    SCRIPT.main()
