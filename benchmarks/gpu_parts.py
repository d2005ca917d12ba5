"""Parts of a step alone: int8 products in both layouts, merged products, attention's operators, copies, settings.

Each `child_` function is a measurement in a process of its own. Sizes are a block's at 1024 x 1024: 4224 tokens of the
published width; a trial has small ones. Seconds are medians.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_images import Child, child_pictures

from zimage_rt.bench.timing import interleave
from zimage_runtime.machine.tiny_onnx import Element, Node, Value, onnx_model

TOKENS, WIDTH, HEADS, OUTPUTS = 4224, 3840, 30, (3840, 10240, 11520)
_MEBIBYTES = 256  # of a copy


def sizes(options: Child) -> tuple[int, int, int, tuple[int, ...]]:
    """Tokens, width, heads and widths of outputs."""
    return (64, 256, 2, (256, 512)) if options["executor"] == "cpu" else (TOKENS, WIDTH, HEADS, OUTPUTS)


def child_layouts(options: Child) -> Child:
    """int8 products by cuBLAS with weights [in, out] and [out, in], 16-bit ones beside them, and three against one."""
    import torch

    device, repeat = options["executor"], options["repeat"]
    tokens, width, _, outputs = sizes(options)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.randint(-127, 127, (tokens, width), dtype=torch.int8, device=device)
    wide = torch.randn(tokens, width, device=device).to(dtype)
    rows: Child = {}
    for out in outputs:
        stored = torch.randint(-127, 127, (width, out), dtype=torch.int8, device=device)
        turned = stored.t().contiguous()
        weight = torch.randn(out, width, device=device).to(dtype)
        calls = {
            "int8 [in, out]": lambda w=stored: torch._int_mm(x, w),
            "int8 [out, in]": lambda w=turned: torch._int_mm(x, w.t()),
            "16 bits [out, in]": lambda w=weight: wide @ w.t(),
        }
        rows[f"{tokens} x {width} x {out}"] = _medians(_tried(calls), repeat, device)
    parts = [torch.randn(width, width, device=device).to(dtype) for _ in range(3)]
    merged = torch.cat(parts, dim=1)
    calls = {"three products": lambda: [wide @ part for part in parts], "one merged": lambda: wide @ merged}
    rows[f"{tokens} x {width} x 3 · {width}"] = _medians(calls, repeat, device)
    return {"rows": rows}


def child_attention(options: Child) -> Child:
    """ONNX Runtime's two operators for a denoiser's attention: opset 23's, and the one that prefers cuDNN on 9.0 and
    10.0. Both see the same values; how far they are apart is in the result."""
    import onnxruntime

    from zimage_runtime.executors.ort.cuda import PROVIDER, preload_libraries

    tokens, width, heads, _ = sizes(options)
    on_gpu = options["executor"] == "cuda"
    element, dtype = (Element.FLOAT16, np.float16) if on_gpu else (Element.FLOAT, np.float32)
    if on_gpu:
        preload_libraries()
    value = Value(element, (1, tokens, width))
    rng = np.random.default_rng(0)
    kind = "cuda" if on_gpu else "cpu"
    feeds = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal((1, tokens, width)).astype(dtype), kind, 0)
        for name in "qkv"
    }
    nodes = {
        "Attention": Node("Attention", "q k v", "y", {"q_num_heads": heads, "kv_num_heads": heads}),
        "MultiHeadAttention": Node("MultiHeadAttention", "q k v", "y", {"num_heads": heads}, domain="com.microsoft"),
    }
    calls: dict[str, Callable[[], object]] = {}
    answers: dict[str, Any] = {}
    for name, node in nodes.items():
        model = onnx_model([node], dict.fromkeys("qkv", value), {"y": value}, opset=23, domains={"com.microsoft": 1})
        providers = [PROVIDER, "CPUExecutionProvider"] if on_gpu else ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(model, providers=providers, enable_fallback=0)
        binding = session.io_binding()
        for key, held in feeds.items():
            binding.bind_ortvalue_input(key, held)
        binding.bind_output("y", kind, 0)

        def call(session: Any = session, binding: Any = binding) -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        call()
        answers[name] = binding.get_outputs()[0].numpy().astype(np.float64)
        calls[name] = call
    one, other = answers.values()
    return {
        "rows": {f"1 x {tokens} x {width}, {heads} heads": _medians(calls, options["repeat"], kind)},
        "difference": float(np.abs(one - other).max()),
    }


def child_copies(options: Child) -> Child:
    """Copies from the host to the GPU out of pinned and out of ordinary memory."""
    import torch

    if options["executor"] == "cpu":
        raise RuntimeError("a trial has no GPU to copy to")
    source = torch.empty(_MEBIBYTES << 20, dtype=torch.uint8)
    target, pinned = torch.empty_like(source, device="cuda"), source.pin_memory()
    calls = {"pinned": lambda: target.copy_(pinned, non_blocking=True), "ordinary": lambda: target.copy_(source)}
    return {"rows": {f"{_MEBIBYTES} MiB": _medians(calls, options["repeat"], "cuda")}}


def child_provider(options: Child) -> Child:
    """Images with settings of ONNX Runtime's CUDA provider changed, beside those of the product's own."""
    from zimage_runtime.executors.ort.cuda import CudaProvider

    ours = CudaProvider.options

    def changed(provider: CudaProvider) -> dict[str, str]:
        return {**ours(provider), **options["changed"]}

    CudaProvider.options = changed  # type: ignore[method-assign]
    return child_pictures(options)


def _tried(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Those that work here: a kernel may be missing for a layout."""
    working = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError:
            continue
        working[name] = call
    return working


def _medians(calls: dict[str, Callable[[], object]], repeat: int, device: str) -> dict[str, float]:
    """Seconds of each call, in turn; each is ten times in a row, for it may be shorter than asking for it."""
    times = 1 if device == "cpu" else 10

    def many(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                call()
            if device == "cuda":
                import torch

                torch.cuda.synchronize()

        return run

    variants = {name: many(call) for name, call in calls.items()}
    for run in variants.values():
        run()
    seconds = interleave(variants, repeat, time.perf_counter)
    return {name: float(np.median(values)) / times for name, values in seconds.items()}
