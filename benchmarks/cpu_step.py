"""One denoising step and one whole picture on the CPU: ours against diffusers, as ratios, with the error beside each.

The model has a few blocks of the published width, each with weights of its own, so that they do not fit in a cache.
Variants take turns, A B C D A B C D, and a ratio is of two calls in the same round. Torch gets as many threads as we
use: the physical cores. An output that is not finite, or further from diffusers in float32 than its type explains,
marks its variant failed.

    python benchmarks/cpu_step.py --work DIR
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    RESULTS,
    describe,
    interleave,
    machine,
    markdown_table,
    open_session,
    physical_threads,
    prepared_bundle,
    ratio,
    relative_error,
    write_results,
)

from zimage_runtime.arrays import FloatArray

OURS, EAGER, COMPILED, EAGER_BF16, COMPILED_BF16 = (
    "ours fp32",
    "diffusers eager fp32",
    "diffusers compiled fp32",
    "diffusers eager bf16",
    "diffusers compiled bf16",
)
_BOUNDS = {OURS: 1e-4, COMPILED: 1e-4, EAGER_BF16: 0.1, COMPILED_BF16: 0.1}  # relative error that still counts
_PROMPT = "a lighthouse on a cliff at dusk, oil painting"
_SEED = 7
_PACKAGES = ("numpy", "onnxruntime", "torch", "diffusers", "transformers")

Clock = Callable[[], float]


def scale(name: str, layers: int) -> Any:
    """`real`: main layers and a refiner at the published width. `tiny`: to try the script on."""
    from zimage_export.synthetic.checkpoint import SMALL, Scale

    small = SMALL.config
    if name == "tiny":
        return SMALL
    text = replace(
        small.text_encoder,
        hidden_size=2560,
        num_hidden_layers=3,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
    )
    transformer = replace(
        small.transformer,
        dim=3840,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=30,
        cap_feat_dim=2560,
        axes_dims=(32, 48, 48),
    )
    vae = replace(small.vae, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    return Scale(replace(small, text_encoder=text, transformer=transformer, vae=vae))


@dataclass
class Measurement:
    """Seconds of every round by variant, errors against diffusers in float32, and what failed and why."""

    size: str
    what: str  # "step" or "picture"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def judge(self, outputs: dict[str, Any]) -> None:
        """Fills in errors, and fails the variants whose error is out of range."""
        for name, output in outputs.items():
            self.errors[name] = relative_error(output, outputs[EAGER])
            if name in _BOUNDS and not self.errors[name] <= _BOUNDS[name]:
                self.failed[name] = f"error {self.errors[name]:.2g} is more than {_BOUNDS[name]:g}"

    def rows(self) -> list[dict[str, Any]]:
        """One entry a variant: median seconds, how many times faster ours is, error."""
        rows = []
        for name, seconds in self.seconds.items():
            times = ratio(seconds, self.seconds[OURS])
            rows.append(
                {
                    "what": self.what,
                    "size": self.size,
                    "variant": name,
                    "rounds": len(seconds),
                    "median_seconds": statistics.median(seconds),
                    "least_seconds": min(seconds),
                    "ours_faster_median": times.median,
                    "ours_faster_least": times.least,
                    "relative_error": self.errors.get(name),
                    "failed": self.failed.get(name),
                }
            )
        absent = [name for name in self.failed if name not in self.seconds]
        rows += [{"what": self.what, "size": self.size, "variant": n, "failed": self.failed[n]} for n in absent]
        return rows


@dataclass(frozen=True)
class Models:
    """Everything that takes part, loaded."""

    ours: Any  # zimage_runtime's Pipeline
    diffusers: dict[str, Any]  # ZImagePipeline by type: float32 and bfloat16
    transformers: dict[str, Any]  # transformer by variant

    @classmethod
    def load(cls, checkpoint: Path, bundle: Path, *, bf16: bool, compiled: bool) -> "Models":
        """Loads diffusers from the checkpoint and ours from the bundle."""
        import torch
        from diffusers import ZImagePipeline

        from zimage_runtime.pipeline import Pipeline

        torch.set_num_threads(physical_threads())
        types = {"fp32": torch.float32, **({"bf16": torch.bfloat16} if bf16 else {})}
        pipelines, transformers = {}, {}
        for short, dtype in types.items():
            pipeline = ZImagePipeline.from_pretrained(str(checkpoint), dtype=dtype)
            pipeline.set_progress_bar_config(disable=True)
            pipelines[short] = pipeline
            transformers[f"diffusers eager {short}"] = pipeline.transformer
            if compiled:
                transformers[f"diffusers compiled {short}"] = torch.compile(pipeline.transformer)
        return cls(Pipeline.from_bundle(bundle), pipelines, transformers)


def step_calls(models: Models, side: int) -> dict[str, Callable[[], FloatArray]]:
    """For every variant a call that gives the velocity of the first step, [1, channels, side / 8, side / 8].

    All take the same hidden states, which are ours. Refining the caption is part of diffusers' step, and not of ours.
    """
    import torch

    from zimage_runtime.pipeline import Request

    ours = models.ours
    request = ours.prepare(Request(_PROMPT, size=(side, side), steps=8, seed=_SEED))
    latents = ours.initial_latents(request.geometry, request.seeds)
    session = open_session(request)
    hidden_states = ours.hidden_states(session, request.ids)
    denoiser = session.denoiser(ours.conditioning(request.geometry, request.schedule, hidden_states))
    hidden = torch.from_numpy(hidden_states[0])
    timestep = torch.from_numpy(request.schedule.timesteps[:1])

    def with_torch(transformer: Any) -> Callable[[], FloatArray]:
        dtype = next(transformer.parameters()).dtype
        image = torch.from_numpy(latents).to(dtype).transpose(0, 1)  # [channels, 1, h, w]

        def call() -> FloatArray:
            with torch.no_grad():
                (output,) = transformer([image], timestep, [hidden.to(dtype)], return_dict=False)[0]
            velocity: FloatArray = (-output.transpose(0, 1)).float().numpy()
            return velocity

        return call

    calls = {name: with_torch(transformer) for name, transformer in models.transformers.items()}
    return {OURS: lambda: denoiser(latents, 0), **calls}


def picture_calls(models: Models, side: int, steps: int) -> dict[str, Callable[[], FloatArray]]:
    """For every variant a call that draws a whole picture and gives its pixels, 0 to 255."""
    import torch

    def ours() -> FloatArray:
        result = models.ours.generate(_PROMPT, size=(side, side), steps=steps, seed=_SEED)
        return np.asarray(result.images[0], np.float32)

    def with_diffusers(pipeline: Any, transformer: Any) -> Callable[[], FloatArray]:
        def call() -> FloatArray:
            original, pipeline.transformer = pipeline.transformer, transformer
            try:
                images = pipeline(
                    _PROMPT,
                    width=side,
                    height=side,
                    num_inference_steps=steps,
                    guidance_scale=0.0,
                    generator=torch.Generator("cpu").manual_seed(_SEED),
                ).images
            finally:
                pipeline.transformer = original
            return np.asarray(images[0], np.float32)

        return call

    calls = {
        name: with_diffusers(models.diffusers[name[-4:]], transformer)
        for name, transformer in models.transformers.items()
    }
    return {OURS: ours, **calls}


def measure(what: str, side: int, calls: dict[str, Callable[[], FloatArray]], rounds: int, clock: Clock) -> Measurement:
    """Runs each call once to warm up and to judge its output, then all in turns."""
    measurement = Measurement(f"{side}x{side}", what)
    outputs = {}
    for name, call in list(calls.items()):
        start = time.perf_counter()
        try:
            outputs[name] = call()
        except Exception as error:  # a compiler that fails, or a type that a kernel lacks
            measurement.failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            calls.pop(name)
        print(f"{what} {side}: {name} first call {time.perf_counter() - start:.1f} s", file=sys.stderr)
    measurement.judge(outputs)
    measurement.seconds = interleave(calls, rounds, clock)
    return measurement


def step_flops(config: Any, side: int, caption_tokens: int) -> float:
    """Multiplications and additions of one of our steps: matrix products and attention."""
    from zimage_runtime.model.geometry import image_geometry
    from zimage_runtime.model.operations import step_operations

    return step_operations(config, image_geometry(side, side, config), caption_tokens).total


def matmul_rate(clock: Clock, side: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations a second of a large float32 matrix product, the best of a few."""
    import torch

    torch.set_num_threads(physical_threads())
    a, b = torch.randn(side, side), torch.randn(side, side)
    seconds = interleave({"matmul": lambda: a @ b}, repeats + 1, clock)["matmul"][1:]
    return 2.0 * side * side * side / min(seconds)


def to_markdown(document: dict[str, Any]) -> str:
    """The results as a page."""
    rows = []
    for row in document["rows"]:
        if "median_seconds" not in row:
            rows.append((row["variant"], row["what"], row["size"], "-", "-", "-", f"failed: {row['failed']}"))
            continue
        error = f"{row['relative_error']:.1e}" + (f", failed: {row['failed']}" if row["failed"] else "")
        faster = f"{row['ours_faster_median']:.2f} (least {row['ours_faster_least']:.2f})"
        rows.append(
            (row["variant"], row["what"], row["size"], row["rounds"], f"{row['median_seconds']:.2f}", faster, error)
        )
    ceilings = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in document["ceiling_seconds"].items())
    return "\n".join(
        [
            "# A step and a picture on the CPU, against diffusers",
            "",
            f"{describe(document['machine'])}.",
            f"Random weights, scale `{document['scale']}` with {document['main_layers']} main layers; "
            f"variants take turns; threads: {document['threads']}; seconds of the {document['seconds_of']}.",
            f"A float32 matrix product of 2048x2048 reaches {document['matmul_rate'] / 1e9:.0f} GFLOP/s; at that rate "
            f"one of our steps takes {ceilings}.",
            "The error is against diffusers eager fp32: of the velocity for a step, of the pixels for a picture.",
            "Seconds are of a machine that other work may share: compare ratios.",
            f"Made by `{document['command']}`.",
            "",
            markdown_table(
                ["variant", "of", "size", "rounds", "median, s", "times that ours is faster", "relative error"], rows
            ),
        ]
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the models, measures, and gives the document; after each measurement it is written, too."""
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = prepared_bundle(
        options.work, f"step-{options.scale}-{options.layers}", scale(options.scale, options.layers)
    )
    clock = time.process_time if options.cpu_time else time.perf_counter
    rate = matmul_rate(clock)
    models = Models.load(checkpoint, bundle, bf16=not options.no_bf16, compiled=not options.no_compile)
    config = models.ours.bundle.manifest.config
    caption_tokens = -(-len(models.ours.token_ids(_PROMPT)) // 32) * 32
    document: dict[str, Any] = {
        "machine": machine(*_PACKAGES),
        "command": _command(options),
        "scale": options.scale,
        "main_layers": config.transformer.n_layers,
        "threads": physical_threads(),
        "seconds_of": "processor" if options.cpu_time else "wall clock",
        "matmul_rate": rate,
        "ceiling_seconds": {f"{s}x{s}": step_flops(config, s, caption_tokens) / rate for s in options.sides},
        "rows": [],
    }
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; a step takes at least {document['ceiling_seconds']}")
    for index, side in enumerate(options.sides):
        rounds = options.rounds[min(index, len(options.rounds) - 1)]
        document["rows"] += measure("step", side, step_calls(models, side), rounds, clock).rows()
        _keep(document, options)
        if index == 0 and options.picture_rounds:
            calls = picture_calls(models, side, options.steps)
            document["rows"] += measure("picture", side, calls, options.picture_rounds, clock).rows()
            _keep(document, options)
    return document


def _command(options: argparse.Namespace) -> str:
    """What was run, without this machine's paths."""
    words = ["taskset -c 0"] if physical_threads() == 1 else []
    words += ["python benchmarks/cpu_step.py --work DIR --layers", options.layers, "--sides", *options.sides]
    words += ["--rounds", *options.rounds, "--picture-rounds", options.picture_rounds, "--steps", options.steps]
    words += ["--name", options.name] if options.name != "cpu_step" else []
    flags = {"--no-bf16": options.no_bf16, "--no-compile": options.no_compile, "--cpu-time": options.cpu_time}
    return " ".join(str(word) for word in [*words, *(flag for flag, given in flags.items() if given)])


def _keep(document: dict[str, Any], options: argparse.Namespace) -> None:
    if options.scale == "real":
        write_results(options.name, document, to_markdown(document), options.out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and bundle are kept: 12 GB")
    parser.add_argument("--scale", choices=["real", "tiny"], default="real")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="pixels; the picture has the first")
    parser.add_argument("--rounds", type=int, nargs="+", default=[5, 3], help="of steps, for each side")
    parser.add_argument("--picture-rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--layers", type=int, default=3, help="main layers of scale real")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor seconds instead of the clock's, for a busy machine; right with one thread (`taskset -c 0`)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written (scale real only)")
    parser.add_argument("--name", default="cpu_step", help="of the results")
    document = run(parser.parse_args())
    print(to_markdown(document))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
