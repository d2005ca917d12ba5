"""The CUDA executor on a GPU, in one run and one report: steps, stages and VRAM at full size; the floor that the card's
measured matrix rate sets; diffusers eager and compiled beside it; parity with the CPU; where every node ran.

    python benchmarks/gpu_cuda.py --work DIR                                     # on a machine with an NVIDIA GPU
    python benchmarks/gpu_cuda.py --work DIR --executor cpu --scale small --out DIR/report      # a trial without one

Weights are random and made here: 20 GB in DIR, and 21 GB for one bundle at a time. Needs torch and onnxruntime-gpu;
without diffusers its columns are left out, and the report says so. Every measurement runs in a process of its own,
for no longer than --limit, and is in the report as soon as it is there; `--only` chooses among them.
Steps of ours and of diffusers take turns in one process, which holds both models: 25 GB of VRAM at full size.
"""

import argparse
import itertools
import json
import shutil
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, interleave, machine, open_session, ratio, relative_error, write_results
from gpu_images import PROMPT, SEED, Child, child_pictures, open_any, open_pipeline
from gpu_placement import SHAPE_ARITHMETIC, copies, where_nodes_ran
from gpu_report import report
from gpu_tools import answer_in_child, best_backend, diffusers_step, matrix_rate, median_seconds, run_child, step_flops
from wide_scale import wide_scale

from zimage_runtime.model.programs import Program

PACKAGES = ("onnxruntime-gpu", "onnxruntime", "torch", "diffusers", "numpy")
TORCH_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
_MEASURES = ("parity", "placement", "pictures", "steps")
_BLOCKS = 4  # of the scale of that name


def our_step(options: Child) -> tuple[Any, int, Any]:
    """A call that runs one step of ours at a size; the tokens of the prompt; the geometry."""
    from zimage_runtime.pipeline import Request

    pipeline = open_pipeline(
        options["bundle"], options["executor"], options["vram"], options["denoiser"], keep_loaded=False
    )
    job = pipeline.prepare(Request(PROMPT, size=tuple(options["size"]), steps=options["steps"], seed=SEED))
    session = open_session(job)
    hidden = pipeline.hidden_states(session, job.ids)
    denoiser = session.denoiser(pipeline.conditioning(job.geometry, job.schedule, hidden))
    latents = pipeline.initial_latents(job.geometry, (SEED,))
    return (lambda: denoiser(latents, options["steps"] // 2)), len(job.ids), job.geometry


def child_steps(options: Child) -> Child:
    """One step of ours and of diffusers', in turn, in one process; and the matrix rate in the same process.

    What diffusers lacks here costs its columns and no others: the result says why.
    """
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.model.geometry import padded

    config = Bundle.open(options["bundle"]).manifest.config
    dtype, device, repeat = options["dtype"], options["executor"], options["repeat"]
    step, tokens, geometry = our_step(options)
    step()
    result, seconds = {}, {}
    if options["diffusers"]:
        try:
            with diffusers_step(config, geometry, tokens, device, dtype) as (model, run):
                backend, backends = best_backend(model, run, repeat)
                result = {"backend": backend, "backends": backends}
                variants = {"ours": step, "diffusers eager": lambda: run(model)}
                if device == "cuda" and options["compiled"]:
                    result |= add_compiled(variants, model, run)
                seconds = interleave(variants, repeat)
        except Exception as error:  # of torch, diffusers or the driver
            result, seconds = {"without": f"no diffusers: {one_line(error)}"}, {}
    if not seconds:
        seconds = interleave({"ours": step}, repeat)
    sizes, tokens = config.transformer, padded(tokens)
    flops = step_flops(config, geometry, tokens)
    rows = geometry.image_tokens + tokens
    rate = matrix_rate(device, dtype, sizes.dim, sizes.ffn_dim, rows, options["rate_seconds"])
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        **result,
        "tera_operations": flops / 1e12,
        "tera_operations_a_second": rate / 1e12,
        "floor_seconds": flops / rate,
        "seconds": medians,
        "over_floor": {name: median * rate / flops for name, median in medians.items()},
        "ours_faster": {
            name: asdict(ratio(values, seconds["ours"])) for name, values in seconds.items() if name != "ours"
        },
    }


def add_compiled(variants: dict[str, Any], model: Any, run: Any) -> Child:
    """diffusers' compiled step as one of the variants; or why there is none."""
    import torch

    try:
        compiled = torch.compile(model, dynamic=False)
        median_seconds(lambda: run(compiled), 3)  # which compiles
    except Exception as error:  # no compiler for the host's code, a GPU too old for Triton
        return {"without": f"diffusers is not compiled: {one_line(error)}"}
    variants["diffusers compiled"] = lambda: run(compiled)
    return {}


def one_line(error: Exception) -> str:
    """An error's class and the start of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def child_parity(options: Child) -> Child:
    """A reduced model on an executor against the CPU executor: latents after all steps, and the picture."""
    from zimage_runtime.pipeline import ImageEvent, Pipeline

    drawn = []
    for pipeline in (
        open_any({**options, "vram": None}),
        Pipeline.from_bundle(options["bundle"], "cpu"),
    ):
        events = pipeline.stream(PROMPT, size=(256, 256), steps=options["steps"], seed=SEED)
        drawn += [event for event in events if isinstance(event, ImageEvent)]
    ours, reference = drawn
    pixels = [np.asarray(event.image, np.float64) for event in drawn]
    mean_square = float(np.mean((pixels[0] - pixels[1]) ** 2))
    return {
        "latents_error": relative_error(ours.latents, reference.latents),
        "psnr": None if mean_square == 0 else float(10 * np.log10(255**2 / mean_square)),
    }


def child_placement(options: Child) -> Child:
    """Where each node of a reduced model's programs ran."""
    from zimage_export.measure.self_check import fixed_inputs
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.manifest import CUDA

    bundle, on_gpu = Bundle.open(options["bundle"]), options["executor"] == "cuda"
    wanted = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    result: Child = {}
    for program, feeds in fixed_inputs(bundle.manifest.config).items():
        if program is Program.MODULATION:
            continue
        name = (options["denoiser"] if program is Program.DENOISER else None) or CUDA
        nodes = where_nodes_ran(bundle.program(program, name), feeds, bundle.root.parent, on_gpu=on_gpu)
        elsewhere = sorted({node["op_name"] for node in nodes if node["provider"] != wanted})
        result[program.value] = {
            "nodes": len(nodes),
            "on_device": sum(node["provider"] == wanted for node in nodes),
            "elsewhere": elsewhere,
            "copies": copies(nodes),
            "as_it_should_be": set(elsewhere) <= SHAPE_ARITHMETIC and not copies(nodes),
        }
    return result


_CHILDREN = {
    "pictures": child_pictures,
    "steps": child_steps,
    "parity": child_parity,
    "placement": child_placement,
}


def in_child(kind: str, options: Child) -> Child:
    """Runs a measurement in a process of its own."""
    return run_child(__file__, kind, options)


def scale_of(name: str) -> Any:
    """The dimensions to build: the published ones, those with few blocks in each stage, the tests' small ones, or these
    with linears as wide as the published ones: "wide"."""
    from zimage_export.synthetic.checkpoint import SCALES

    full = SCALES["full"]
    if name == "wide":
        return wide_scale()
    if name != "blocks":
        return SCALES[name]
    config = replace(
        full.config,
        transformer=replace(full.config.transformer, n_layers=_BLOCKS, n_refiner_layers=1),
        text_encoder=replace(full.config.text_encoder, num_hidden_layers=_BLOCKS),
    )
    return replace(full, config=config)


def prepared(work: Path, scale_name: str, precision: str, *, engines: bool = False) -> Path:
    """The bundle of a precision and scale, made where it is not there; at full size, the only one there is."""
    from zimage_export.build import BuildOptions, build
    from zimage_export.synthetic.checkpoint import write_checkpoint
    from zimage_runtime.bundle.manifest import Precision
    from zimage_runtime.bundle.tensors import DType
    from zimage_runtime.command_line.progress import Progress

    work.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = work / f"checkpoint-{scale_name}", work / f"bundle-{scale_name}-{precision}"
    if engines:
        bundle = bundle.with_name(f"{bundle.name}-engines")
    if not checkpoint.exists():
        write_checkpoint(checkpoint, scale_of(scale_name), transformer_type=DType.BF16, progress=Progress())
    if not bundle.exists():
        if scale_name == "full":
            for other in work.glob("bundle-full-*"):
                shutil.rmtree(other)
        build(checkpoint, bundle, BuildOptions(Precision(precision), engines=engines), Progress())
    return bundle


def ways(precision: str) -> list[tuple[str, str | None]]:
    """What to call a precision and which denoiser to run: int8 has two."""
    from zimage_runtime.bundle.manifest import CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY

    if precision != "int8":
        return [(precision, None)]
    return [("int8", CUDA), ("int8 weight-only", CUDA_WEIGHT_ONLY), ("int8 blocks", CUDA_BLOCKS)]


def run(options: argparse.Namespace) -> Child:
    """Every measurement, precision by precision."""
    from zimage_runtime.machine.gpus import find_gpu

    cuda = options.executor == "cuda"
    gpu = find_gpu() if cuda else None
    half = "bf16" if gpu is None or gpu.has_bf16 else "fp16"
    document: Child = {
        "machine": machine(*PACKAGES),
        "gpu": {**vars(gpu), "free": None, "uuid": None} if gpu else None,
        "scale": options.scale,
        "steps": options.steps,
        "diffusers": find_spec("diffusers") is not None and not options.without_diffusers,
        "parity": {},
        "placement": {},
        "pictures": [],
        "one_step": [],
    }
    common = {
        "executor": options.executor,
        "vram": options.vram << 20 if options.vram else None,
        "steps": options.steps,
        "repeat": options.repeat,
        "rate_seconds": 3.0 if cuda else 0.1,
        "limit": options.limit,
        "compiled": not options.without_compiled,
    }

    def kept() -> None:  # what there is, should it be cut short
        write_results(options.name, document, report(document), options.out)

    for precision, kind in itertools.product(options.precision, ("parity", "placement")):
        if kind not in options.only:
            continue
        reduced = {**common, "bundle": str(prepared(options.work, "small", precision))}
        for name, denoiser in ways(precision):
            document[kind][name] = in_child(kind, {**reduced, "precision": name, "denoiser": denoiser})
            kept()
    for precision in options.precision:
        if not {"pictures", "steps"} & set(options.only):
            break
        bundle = str(prepared(options.work, options.scale, precision))
        dtype = TORCH_TYPES.get(precision, TORCH_TYPES[half])  # the floor of integers is 16 bits' own
        for size, (name, denoiser) in itertools.product(options.size, ways(precision)):
            one = {**common, "bundle": bundle, "precision": name, "denoiser": denoiser, "size": size, "dtype": dtype}
            # diffusers runs in 16 bits alone, as its users run it
            beside = document["diffusers"] and precision == (half if cuda else "fp32")
            if "pictures" in options.only:
                document["pictures"].append({**one, **in_child("pictures", one)})
                kept()
            if "steps" in options.only:
                document["one_step"].append({**one, **in_child("steps", {**one, "diffusers": beside})})
                kept()
    return document


def size_of(text: str) -> tuple[int, int]:
    """A size such as 1024x768."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--child"]:
        print(json.dumps(answer_in_child(_CHILDREN, *words[1:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and bundles are put")
    parser.add_argument("--executor", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "blocks", "small"], default="full")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp16", "int8"], choices=_PRECISIONS)
    parser.add_argument("--size", nargs="+", type=size_of, default=[(512, 512), (1024, 1024), (1536, 1536)])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--vram", type=int, metavar="MIB", help="budget; by default what is free")
    parser.add_argument("--without-diffusers", action="store_true")
    parser.add_argument("--without-compiled", action="store_true", help="diffusers' step uncompiled alone")
    parser.add_argument("--only", nargs="+", default=list(_MEASURES), choices=_MEASURES, help="what is measured")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for each measurement")
    parser.add_argument("--name", default="gpu_cuda", help="of the report's files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    document = run(options)
    print(report(document))


if __name__ == "__main__":
    main()
