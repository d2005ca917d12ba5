"""What the GPU benchmark is made of: watching VRAM, the card's measured matrix rate, a step's work, diffusers' step."""

import faulthandler
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from zimage_runtime.machine.gpu_monitor import GpuMonitor, open_monitor
from zimage_runtime.machine.nvml import Unmeasured


def run_child(script: str, kind: str, options: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Runs a script's measurement in a process of its own, for at most `options["limit"]` seconds.

    What it raises is its result, so that the other measurements go on.
    """
    what = (kind, options.get("executor", ""), options.get("precision", ""), options.get("size", ""))
    print(time.strftime("%H:%M:%S"), *what, file=sys.stderr, flush=True)
    words = [sys.executable, script, "--child", kind, json.dumps(options)]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=options["limit"],
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired as late:
        said = late.stderr or b""  # bytes, whatever `text` says
        print(said.decode(errors="replace") if isinstance(said, bytes) else said, file=sys.stderr, flush=True)
        return {"failed": f"not done in {options['limit']} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:500]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


_MONITORS: list[GpuMonitor] = []


def spent_joules() -> float:
    """What the GPU has used since its driver was loaded, by its own counter; 0 where there is none."""
    if not _MONITORS:
        monitor = open_monitor()
        if isinstance(monitor, Unmeasured):
            return 0.0
        _MONITORS.append(monitor)
    joules = _MONITORS[0].energy()
    return 0.0 if isinstance(joules, Unmeasured) else joules


_INTERVAL = 0.005  # seconds between two looks at the memory


@dataclass
class VramWatch:
    """The most GPU memory in use while it watches: what the device gained, and what this process held.

    Zero where there is no GPU; None for a process that NVML does not list, as in some containers.
    """

    device: int = 0  # bytes more than when the watch began
    process: int | None = None
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        monitor = open_monitor()
        if not isinstance(monitor, Unmeasured):
            self._thread = threading.Thread(target=self._watch, args=(monitor, monitor.used_memory()), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _watch(self, monitor: GpuMonitor, start: int | Unmeasured) -> None:
        with monitor:
            while not self._stop.is_set():
                used, own = monitor.used_memory(), monitor.process_memory(os.getpid())
                if not isinstance(used, Unmeasured) and not isinstance(start, Unmeasured):
                    self.device = max(self.device, used - start)
                if not isinstance(own, Unmeasured):
                    self.process = max(self.process or 0, own)
                time.sleep(_INTERVAL)


def step_flops(config: Any, geometry: Any, caption_tokens: int) -> float:
    """Operations of one step: two for each multiplication and addition of matrix products and attention."""
    t = config.transformer
    linear = 4 * t.dim**2 + 3 * t.dim * t.ffn_dim  # parameters of a block
    image, both = geometry.image_tokens, geometry.image_tokens + caption_tokens
    return float(
        t.n_layers * (2 * both * linear + 4 * both**2 * t.dim)
        + t.n_refiner_layers * (2 * image * linear + 4 * image**2 * t.dim)
    )


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


def median_seconds(call: Callable[[], object], repeat: int) -> float:
    """The median of `repeat` calls, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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


def answer_in_child(measures: Mapping[str, Callable[[dict[str, Any]], Any]], kind: str, options: str) -> Any:
    """What a measurement of that kind gives, in the process that was started for it. `options` is JSON."""
    asked: dict[str, Any] = json.loads(options)
    faulthandler.dump_traceback_later(max(asked["limit"] - 3, 1))  # where it was, should it be too slow
    return measures[kind](asked)
