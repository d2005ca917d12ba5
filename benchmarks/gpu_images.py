"""Whole images on an executor. Each `child_` function is a measurement in a process of its own."""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from zimage_rt.bench.accuracy import psnr_db, relative_error
from zimage_runtime.machine.gpu_monitor import GpuMonitor, open_monitor
from zimage_runtime.machine.nvml import Unmeasured
from zimage_runtime.pipeline import ImageEvent, Pipeline, Request

PROMPT = "a lighthouse on a cliff at dusk, waves breaking below, oil painting with visible brush strokes"
SEED = 7

Child = dict[str, Any]

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


def open_pipeline(
    bundle: str, executor: str, vram: int | None = None, denoiser: str | None = None, *, keep_loaded: bool = True
) -> Pipeline:
    """A pipeline on the CUDA programs: on the GPU, or for a trial on the CPU."""
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.executors.ort.cuda import budget_of, cuda_executor
    from zimage_runtime.executors.ort.device import OrtDevice
    from zimage_runtime.machine.gpus import find_gpu

    opened, gpu = Bundle.open(bundle), None if executor == "cpu" else find_gpu()
    room = vram if vram is not None else 1 << 40 if gpu is None else budget_of(gpu)
    capability = None if gpu is None else gpu.capability
    made = cuda_executor(
        opened,
        budget=room,
        device=OrtDevice(executor),
        capability=capability,
        denoiser=denoiser,
        keep_loaded=keep_loaded,
    )
    return Pipeline.on(opened, made)


def open_any(options: Child) -> Pipeline:
    """A pipeline on the executor of a measurement: CUDA's programs on a device, or another executor by its name."""
    if options["executor"] in ("cuda", "cpu"):
        return open_pipeline(options["bundle"], options["executor"], options["vram"], options["denoiser"])
    return Pipeline.from_bundle(options["bundle"], options["executor"], options["vram"])


def child_pictures(options: Child) -> Child:
    """Whole images of one size: the first loads everything, those that follow find it loaded."""
    size, steps = tuple(options["size"]), options["steps"]
    with VramWatch() as watch, open_any(options) as pipeline:
        found = []
        joules = 0.0
        for _ in range(1 + options["repeat"]):
            pipeline.forget_prompt()  # every image encodes it
            before = spent_joules()
            found.append(pipeline.generate(PROMPT, size=size, steps=steps, seed=SEED).timings)
            joules = spent_joules() - before
        plan = pipeline.prepare(Request(PROMPT, size=size, steps=steps)).plan
        pipeline.release()
        with VramWatch() as idle:
            time.sleep(0.1)
    first, *later = found
    best = min(later, key=lambda timings: timings.total)
    return {
        "first_seconds": first.total,
        "seconds": best.total,
        "caption_seconds": best.caption,
        "step_seconds": float(np.median([step for timings in later for step in timings.steps])),
        "decode_seconds": float(np.median([second for timings in later for second in timings.decode])),
        "joules": joules or None,
        "device_bytes": watch.device,
        "process_bytes": watch.process,
        "released_process_bytes": idle.process,
        "planned_bytes": plan.peak,
        "keep_all": getattr(plan, "keep_all", None),
        "notices": list(plan.notes),
    }


def child_cycle(options: Child) -> Child:
    """Many images in a row whose sizes take turns: every round gives the first round's images, in the same memory."""
    sizes = [tuple(size) for size in options["sizes"]]
    latents: dict[tuple[int, ...], Any] = {}
    rounds: list[int | None] = []
    equal = True
    with open_any(options) as pipeline:
        for index in range(options["images"]):
            size = sizes[index % len(sizes)]
            pipeline.forget_prompt()
            with VramWatch() as watch:
                event = last_event(pipeline, size, options["steps"])
            equal &= bool((latents.setdefault(size, event.latents) == event.latents).all())
            equal &= bool(np.isfinite(event.latents).all())
            if index % len(sizes) == 0:
                rounds.append(watch.process)
            else:
                rounds[-1] = None if watch.process is None else max(rounds[-1] or 0, watch.process)
    known = [held for held in rounds[1:] if held is not None]  # the first round loads
    return {
        "images": options["images"],
        "equal": equal,
        "growth_bytes": known[-1] - known[0] if known else None,
        "round_bytes": rounds,
    }


def child_parity(options: Child) -> Child:
    """A reduced model on an executor against the CPU executor: latents after all steps, and the image."""
    with open_any({**options, "vram": None}) as ours, Pipeline.from_bundle(options["bundle"], "cpu") as reference:
        one, other = (last_event(pipeline, (256, 256), options["steps"]) for pipeline in (ours, reference))
    psnr = psnr_db(np.asarray(one.image), np.asarray(other.image))
    return {"latents_error": relative_error(one.latents, other.latents), "psnr": None if np.isinf(psnr) else psnr}


def last_event(pipeline: Pipeline, size: tuple[int, ...], steps: int) -> ImageEvent:
    """One image, with its latents."""
    *_, last = pipeline.stream(PROMPT, size=size, steps=steps, seed=SEED)
    assert isinstance(last, ImageEvent)
    return last


def child_start(options: Child) -> Child:
    """How long a user waits for the first image: from before the process was started, and from when it could begin."""
    begin = time.time()
    with open_any(options) as pipeline:
        opened = time.time()
        last_event(pipeline, tuple(options["size"]), options["steps"])
        done = time.time()
    return {
        "process_seconds": begin - options["started"],
        "open_seconds": opened - begin,
        "first_image_seconds": done - opened,
        "cached_bytes": folder_bytes(Path(os.environ["XDG_CACHE_HOME"])) if "XDG_CACHE_HOME" in os.environ else None,
    }


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
