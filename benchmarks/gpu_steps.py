"""One step of ours on the CUDA programs beside diffusers', and the floor that the card's matrix rate sets."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from gpu_images import PROMPT, Child, open_pipeline

from zimage_rt.bench.children import one_line
from zimage_rt.bench.steps import our_step
from zimage_rt.bench.timing import interleave, median_seconds, ratio


def child_steps(options: Child) -> Child:
    """One step of ours and of diffusers', in turn, in one process; and the matrix rate in the same process.

    What diffusers lacks here costs its columns and no others: the result says why.
    """
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.model.geometry import padded
    from zimage_runtime.model.operations import step_operations

    config = Bundle.open(options["bundle"]).manifest.config
    dtype, device, repeat, count = options["dtype"], options["executor"], options["repeat"], options["steps"]
    pipeline = open_pipeline(options["bundle"], device, options["vram"], options["denoiser"], keep_loaded=False)
    ours = our_step(pipeline, tuple(options["size"]), prompt=PROMPT, steps=count, number=count // 2)
    step, tokens, geometry = ours.call, ours.tokens, ours.geometry
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
    sizes, flops = config.transformer, step_operations(config, geometry, tokens).total
    rows = geometry.image_tokens + padded(tokens)
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


def matrix_rate(device: str, dtype_name: str, dim: int, inner: int, rows: int, seconds: float = 3.0) -> float:
    """Operations a second of matrix products of a block's shapes, after warming up: the median of many."""
    import torch

    dtype = getattr(torch, dtype_name)
    a = torch.randn(rows, dim, device=device).to(dtype)
    weight = torch.randn(dim, inner, device=device).to(dtype)
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(a, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(10 * 2.0 * rows * dim * inner / (time.perf_counter() - start))
    return statistics.median(rates[len(rates) // 3 :])


DIFFUSERS_BACKENDS = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3", "sage")
"""Attention backends of diffusers that are tried; those that this machine lacks fail at once."""


@contextmanager
def diffusers_step(
    config: Any, geometry: Any, tokens: int, device: str, dtype_name: str
) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    """diffusers' transformer with random weights on the device; and what runs a step of it, or of its compiled self.

    A model's attention backend becomes that of the whole process: afterwards it is again what it was.
    """
    import torch
    from diffusers import ZImageTransformer2DModel, attention_backend

    dtype, sizes = getattr(torch, dtype_name), config.transformer
    with torch.device(device):
        torch.manual_seed(0)
        model = ZImageTransformer2DModel(**asdict(sizes), n_kv_heads=sizes.n_heads).to(dtype).eval()
        latents = torch.randn(sizes.in_channels, 1, geometry.latent_height, geometry.latent_width)
        hidden = torch.randn(tokens, sizes.cap_feat_dim)
        inputs = ([latents.to(dtype)], torch.full((1,), 0.3), [hidden.to(dtype)])

    def step(run: Any) -> Any:
        with torch.no_grad():
            output = run(*inputs)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    try:
        with attention_backend():
            yield model, step
    finally:
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


def best_backend(model: Any, step: Callable[[Any], Any], repeat: int) -> tuple[str, dict[str, float]]:
    """Sets the attention backend with which diffusers' step is fastest; and the seconds with each."""
    seconds: dict[str, float] = {}
    for name in DIFFUSERS_BACKENDS:
        try:
            model.set_attention_backend(name)
            seconds[name] = median_seconds(lambda: step(model), repeat)
        except Exception:  # a backend whose package or hardware is not here raises whatever it likes
            continue
    if not seconds:
        raise RuntimeError("none of diffusers' attention backends runs here")
    best = min(seconds, key=lambda name: seconds[name])
    model.set_attention_backend(best)
    return best, seconds
