"""One denoising step in int8 and int4 on the CPU, against our fp32 and against torch, with the error beside each.

At least eight blocks of the published width, each with weights of its own (ONNX Runtime shares equal ones), so that
nothing fits in a cache. Variants take turns, and a ratio is of two calls in the same round. Beside the step stand the
rate of a large integer matrix product on this machine, how much of it the step reaches, and what the time outside the
integer products is, by operator, from ONNX Runtime's profile.

    python benchmarks/int8_step.py --work DIR
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cpu_step
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
from cpu_step import COMPILED, COMPILED_BF16, EAGER, EAGER_BF16, OURS

from zimage_runtime.arrays import FloatArray

INT8, INT4 = "ours int8", "ours int4"
VARIANTS = (OURS, INT8, INT4, EAGER, EAGER_BF16, COMPILED, COMPILED_BF16)
_BOUNDS = {OURS: 1e-4, COMPILED: 1e-4, EAGER_BF16: 0.1, COMPILED_BF16: 0.1, INT8: 0.2, INT4: 0.5}
_PACKAGES = ("numpy", "onnxruntime", "torch", "diffusers")
_PRODUCTS = ("MatMulIntegerToFloat", "MatMulInteger")
_PROMPT, _SEED = "a lighthouse on a cliff at dusk, oil painting", 7

Calls = dict[str, Callable[[], FloatArray]]


def quantized_bundle(checkpoint: Path, fp32: Path, precision: str) -> Path:
    """The checkpoint's bundle in a precision, beside the fp32 one; made when that is newer or it is not there."""
    from zimage_export.build import BuildOptions, build
    from zimage_runtime.bundle.manifest import Precision
    from zimage_runtime.command_line.progress import Progress

    out = fp32.with_name(f"{fp32.name}-{precision}")
    made = out / "manifest.json"
    if not made.exists() or made.stat().st_mtime < (fp32 / "manifest.json").stat().st_mtime:
        build(checkpoint, out, BuildOptions(Precision(precision), force=True), Progress())
    return out


def our_step(bundle: Path, side: int) -> Callable[[], FloatArray]:
    """A call that gives the velocity of the first step. Every bundle gets its own hidden states and modulation."""
    from zimage_runtime.pipeline import Pipeline, Request

    pipeline = Pipeline.from_bundle(bundle, "cpu", keep_loaded=False)  # so the text encoder is freed
    request = pipeline.prepare(Request(_PROMPT, size=(side, side), steps=8, seed=_SEED))
    latents = pipeline.initial_latents(request.geometry, request.seeds)
    session = open_session(request)
    hidden_states = pipeline.hidden_states(session, request.ids)
    denoiser = session.denoiser(pipeline.conditioning(request.geometry, request.schedule, hidden_states))
    return lambda: denoiser(latents, 0)


def torch_steps(checkpoint: Path, bundle: Path, side: int, wanted: Sequence[str]) -> Calls:
    """The wanted variants of diffusers, with the fp32 bundle's hidden states."""
    torch_variants = [name for name in wanted if name.startswith("diffusers")]
    if not torch_variants:
        return {}
    models = cpu_step.Models.load(
        checkpoint,
        bundle,
        bf16=any(name.endswith("bf16") for name in torch_variants),
        compiled=any("compiled" in name for name in torch_variants),
    )
    calls = cpu_step.step_calls(models, side)
    models.ours.release()
    return {name: call for name, call in calls.items() if name in torch_variants}


def judged(calls: Calls) -> tuple[dict[str, float], dict[str, str]]:
    """Runs each call once. Returns errors against fp32 (diffusers where it takes part, else ours), and failures."""
    outputs: dict[str, FloatArray] = {}
    failed: dict[str, str] = {}
    for name, call in list(calls.items()):
        start = time.perf_counter()
        try:
            outputs[name] = call()
        except Exception as error:  # a compiler that fails, or a type that a kernel lacks
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            calls.pop(name)
        print(f"{name}: first call {time.perf_counter() - start:.1f} s", file=sys.stderr)
    reference = outputs[EAGER] if EAGER in outputs else outputs[OURS]
    errors = {name: relative_error(output, reference) for name, output in outputs.items()}
    for name, error in errors.items():
        if name in _BOUNDS and not error <= _BOUNDS[name]:
            failed[name] = f"error {error:.2g} is more than {_BOUNDS[name]:g}"
    return errors, failed


def integer_product_rate(tokens: int, dim: int, ffn_dim: int, clock: Callable[[], float]) -> float:
    """Operations a second of `MatMulInteger` with packed int8 weights [dim, ffn_dim]: the best of a few."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from zimage_runtime.machine.int8_products import activation_levels

    levels = int(activation_levels())
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (dim, ffn_dim), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [tokens, dim])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [tokens, ffn_dim])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array(levels + 1, np.uint8), "zero")],
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_threads()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": rng.integers(1, 2 * levels + 2, (tokens, dim), dtype=np.uint8)}
    seconds = interleave({"product": lambda: session.run(None, feeds)}, 6, clock)["product"][1:]
    return 2.0 * tokens * dim * ffn_dim / min(seconds)


def integer_operations(config: Any, side: int, caption_tokens: int) -> float:
    """Multiplications and additions of a step's quantized linears; attention, which is float32, is not among them."""
    from zimage_runtime.model.geometry import image_geometry

    c = config.transformer
    image = image_geometry(side, side, config).image_tokens
    weights = 4 * c.dim * c.dim + 3 * c.dim * c.ffn_dim
    return 2.0 * weights * (c.n_refiner_layers * image + c.n_layers * (image + caption_tokens))


def profile(bundle: Path, side: int, runs: int) -> dict[str, float]:
    """Milliseconds a step by operator, the median of a few steps, from ONNX Runtime's own profile."""
    import onnxruntime

    from zimage_runtime.model.programs import Program

    made = onnxruntime.SessionOptions

    class Profiled(made):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True
            self.profile_file_prefix = f"{folder}/{len(list(Path(folder).iterdir()))}"

    with tempfile.TemporaryDirectory() as folder:
        onnxruntime.SessionOptions = Profiled
        try:
            from zimage_runtime.bundle.bundle import Bundle
            from zimage_runtime.executors.ort.cpu import OrtCpuExecutor
            from zimage_runtime.pipeline import Pipeline, Request

            executor = OrtCpuExecutor(Bundle.open(bundle))
            pipeline = Pipeline.on(executor.bundle, executor)
            request = pipeline.prepare(Request(_PROMPT, size=(side, side), steps=8, seed=_SEED))
            opened = open_session(request)
            hidden = pipeline.hidden_states(opened, request.ids)
            denoiser = opened.denoiser(pipeline.conditioning(request.geometry, request.schedule, hidden))
            latents = pipeline.initial_latents(request.geometry, request.seeds)
            for _ in range(runs + 1):
                denoiser(latents, 0)
            session = executor.programs._sessions[Program.DENOISER]
            events = json.loads(Path(session.end_profiling()).read_text())
            pipeline.release()
        finally:
            onnxruntime.SessionOptions = made
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    per_run = len(nodes) // (runs + 1)
    totals = []
    for run in range(1, runs + 1):
        total: Counter[str] = Counter()
        for event in nodes[run * per_run : (run + 1) * per_run]:
            total[event["args"]["op_name"]] += event["dur"] / 1e3
        totals.append(total)
    return {name: statistics.median(total[name] for total in totals) for name in totals[0]}


def measure(
    side: int, checkpoint: Path, bundles: dict[str, Path], options: argparse.Namespace, clock: Callable[[], float]
) -> dict[str, Any]:
    """Everything at one size."""
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.model.tokenizer import PromptTokenizer

    calls: Calls = {n: our_step(bundles[n], side) for n in options.variants if n in bundles}
    calls |= torch_steps(checkpoint, bundles[OURS], side, options.variants)
    errors, failed = judged(calls)
    seconds = interleave(calls, options.rounds, clock)
    opened = Bundle.open(bundles[OURS])
    config = opened.manifest.config
    tokens = len(PromptTokenizer(opened.file(opened.manifest.tokenizer)).encode(_PROMPT))
    padded = -(-tokens // 32) * 32
    image = (side // 16) ** 2
    c = config.transformer
    rate = integer_product_rate(image + padded, c.dim, c.ffn_dim, clock)
    operations = integer_operations(config, side, padded)
    document: dict[str, Any] = {
        "size": f"{side}x{side}",
        "tokens": image + padded,
        "integer_product_rate": rate,
        "integer_seconds_at_that_rate": operations / rate,
        "rows": [
            {
                "variant": name,
                "rounds": len(taken),
                "median_seconds": statistics.median(taken),
                "least_seconds": min(taken),
                "of_our_fp32": ratio(taken, seconds[OURS]).median if OURS in seconds else None,
                "int8_faster": ratio(taken, seconds[INT8]).median if INT8 in seconds else None,
                "relative_error": errors.get(name),
                "failed": failed.get(name),
            }
            for name, taken in seconds.items()
        ],
        "failed": failed,
    }
    calls.clear()
    if INT8 in bundles and options.profile_runs:
        by_operator = profile(bundles[INT8], side, options.profile_runs)
        products = sum(by_operator.get(name, 0.0) for name in _PRODUCTS)
        document["profile_ms"] = dict(sorted(by_operator.items(), key=lambda item: -item[1]))
        document["fraction_of_rate_in_products"] = operations / rate / (products / 1e3)
    if INT8 in seconds:
        document["fraction_of_rate_in_step"] = operations / rate / statistics.median(seconds[INT8])
    return document


def to_markdown(document: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# A step in int8 and int4 on the CPU",
        "",
        f"{describe(document['machine'])}.",
        f"Random weights, {document['main_layers']} main blocks and {document['refiners']} refiner of width "
        f"{document['dim']}; activations of {document['activation_bits']} bits; variants take turns; threads: "
        f"{document['threads']}; seconds of the {document['seconds_of']}.",
        "The error is of the first step's velocity, against diffusers eager fp32, or our fp32 where that took no part. "
        "Seconds are of a machine that other work may share: compare ratios, which are medians over the rounds.",
        f"Made by `{document['command']}`.",
    ]
    for size in document["sizes"]:
        rows = []
        for row in size["rows"]:
            error = f"{row['relative_error']:.1e}" + (f", failed: {row['failed']}" if row["failed"] else "")
            of_fp32, faster = (f"{row[k]:.2f}" if row[k] is not None else "-" for k in ("of_our_fp32", "int8_faster"))
            rows.append((row["variant"], row["rounds"], f"{row['median_seconds']:.3f}", of_fp32, faster, error))
        rate = size["integer_product_rate"] / 1e9
        lines += ["", f"## {size['size']}: {size['tokens']} tokens", ""]
        header = [
            "variant",
            "rounds",
            "median, s",
            "time, of our fp32's",
            "times that int8 is faster",
            "relative error",
        ]
        lines += [markdown_table(header, rows), ""]
        lines.append(
            f"A MatMulInteger of these tokens reaches {rate:.0f} GOP/s; at that rate the step's integer products take "
            f"{size['integer_seconds_at_that_rate']:.3f} s"
            + (f": {100 * size['fraction_of_rate_in_step']:.0f} % of the step" if INT8 in document["variants"] else "")
            + (
                f", {100 * size['fraction_of_rate_in_products']:.0f} % of the time in its integer products."
                if "profile_ms" in size
                else "."
            )
        )
        if "profile_ms" in size:
            whole = sum(size["profile_ms"].values())
            profiled = [
                (name, f"{taken:.1f}", f"{100 * taken / whole:.1f}")
                for name, taken in size["profile_ms"].items()
                if taken > 0.002 * whole
            ]
            lines += ["", markdown_table(["operator", "ms a step", "%"], profiled)]
        lines += [f"\n{name} failed: {why}" for name, why in size["failed"].items() if name not in _BOUNDS]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the models, measures, and gives the document; after each size it is written, too."""
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.machine.int8_products import activation_bits

    options.work.mkdir(parents=True, exist_ok=True)
    name = f"step-{options.scale}-{options.layers}"
    checkpoint, fp32 = prepared_bundle(options.work, name, cpu_step.scale(options.scale, options.layers))
    bundles = {OURS: fp32}
    bundles |= {n: quantized_bundle(checkpoint, fp32, n.split()[1]) for n in (INT8, INT4) if n in options.variants}
    transformer = Bundle.open(fp32).manifest.config.transformer
    clock = time.process_time if options.cpu_time else time.perf_counter
    document: dict[str, Any] = {
        "machine": machine(*_PACKAGES),
        "command": _command(options),
        "main_layers": transformer.n_layers,
        "refiners": transformer.n_refiner_layers,
        "dim": transformer.dim,
        "threads": physical_threads(),
        "activation_bits": activation_bits(),
        "seconds_of": "processor" if options.cpu_time else "wall clock",
        "variants": options.variants,
        "sizes": [],
    }
    for side in options.sides:
        document["sizes"].append(measure(side, checkpoint, bundles, options, clock))
        if options.scale == "real":
            write_results(options.name, document, to_markdown(document), options.out)
    return document


def _command(options: argparse.Namespace) -> str:
    """What was run, without this machine's paths."""
    words = ["python benchmarks/int8_step.py --work DIR --layers", options.layers, "--sides", *options.sides]
    words += ["--rounds", options.rounds, "--profile-runs", options.profile_runs]
    if options.variants != list(VARIANTS):
        words += ["--variants", *(f'"{name}"' for name in options.variants)]
    words += ["--name", options.name] if options.name != "int8_step" else []
    words += ["--cpu-time"] if options.cpu_time else []
    return " ".join(str(word) for word in words)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and bundles are kept: 20 GB")
    parser.add_argument("--scale", choices=["real", "tiny"], default="real")
    parser.add_argument("--layers", type=int, default=8, help="main layers of scale real")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="pixels: 320 and 1088 tokens or so")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile-runs", type=int, default=3, help="steps that are profiled; 0 for none")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="all of them take 20 GB of memory"
    )
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for a busy machine and one thread")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written (scale real only)")
    parser.add_argument("--name", default="int8_step", help="of the results")
    document = run(parser.parse_args())
    print(to_markdown(document))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
