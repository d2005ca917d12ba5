"""The tensorrt executor's own code on a GPU that TensorRT for RTX does not serve: block programs computed by torch.

    python benchmarks/gpu_torch_engines.py BUNDLE [--reference PNG_OR_NPY] [--size 256] [--vram 1GiB]... [--out FILE]

Device memory, pinned weights, streams, events, graph capture, budgets and release are the executor's, through
cuda-bindings. Each check writes one line of JSON when it is done. One that takes longer than `--limit` seconds ends
the process, with all threads' stacks on stderr. `--write-reference` draws on the `cpu` executor instead, and
`--stand-in` runs everything on the tests' stand-in device. It needs neither TensorRT nor ONNX Runtime.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("tests", "export", "runtime", ".")]

import torch  # noqa: E402
from device_stand_in import StandInDevice  # noqa: E402
from onnx_engines import twin_spec  # noqa: E402
from torch_engines import CudaMemory, Memory, StandInMemory, TorchContext, TorchEngines, TorchHostPrograms  # noqa: E402

from zimage_export.engines.build import bundle_blocks  # noqa: E402
from zimage_runtime.bundle.bundle import Bundle  # noqa: E402
from zimage_runtime.events import ImageEvent, StepEvent  # noqa: E402
from zimage_runtime.executors.tensorrt.cuda import CudaDevice  # noqa: E402
from zimage_runtime.executors.tensorrt.denoiser import StageDenoiser  # noqa: E402
from zimage_runtime.executors.tensorrt.device import Device  # noqa: E402
from zimage_runtime.executors.tensorrt.executor import TensorRtExecutor  # noqa: E402
from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES, smallest_budget  # noqa: E402
from zimage_runtime.executors.tensorrt.stage_sizes import STAGES, ImageSizes, stage_needs  # noqa: E402
from zimage_runtime.machine.gpu_targets import Variant  # noqa: E402
from zimage_runtime.model.programs import Program  # noqa: E402
from zimage_runtime.pipeline import Pipeline, Request  # noqa: E402

PROMPT = "a red fox in the snow, golden hour"
SEED = 7


@dataclass
class Drawn:
    """One picture."""

    latents: np.ndarray[Any, Any]
    pixels: np.ndarray[Any, Any]
    seconds: float
    steps: list[float]

    def same(self, other: "Drawn") -> bool:
        """Whether all bits are."""
        return bool((self.latents == other.latents).all() and (self.pixels == other.pixels).all())


@dataclass
class Bench:
    """The bundle on one device, and where results go."""

    bundle: Bundle
    device: Device
    memory: Memory
    steps: int
    limit: float
    out: Path | None
    reference: np.ndarray[Any, Any] | None = None
    failed: int = 0
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.programs = bundle_blocks(self.bundle, Variant.AMPERE)
        self.spec = twin_spec(self.bundle, self.programs)

    def write(self, line: dict[str, Any]) -> None:
        """Writes one line to stdout and to the file."""
        self.lines.append(json.dumps(line))
        print(self.lines[-1], flush=True)
        if self.out:
            self.out.write_text("\n".join(self.lines) + "\n")

    def check(self, name: str, call: Callable[[], dict[str, Any]]) -> None:
        """Runs one check within the limit. Its `ok`, if it has one, decides whether it failed."""

        def expire() -> None:
            self.write({"check": name, "ok": False, "error": f"took longer than {self.limit} s"})
            faulthandler.dump_traceback(all_threads=True)
            os._exit(3)

        timer = threading.Timer(self.limit, expire)
        timer.daemon = True
        timer.start()
        start = time.perf_counter()
        try:
            values = call()
        except Exception as error:  # whatever it is belongs in the report, and the next check runs
            values = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        finally:
            timer.cancel()
        self.failed += not values.get("ok", True)
        self.write({"check": name, "seconds": round(time.perf_counter() - start, 3), **values})

    @contextlib.contextmanager
    def pipeline(self, vram: int, pinnable: int = 1 << 34) -> Iterator[tuple[Pipeline, TensorRtExecutor]]:
        """A pipeline on a new executor."""
        engines = TorchEngines(self.memory, self.programs, self.spec)
        executor = TensorRtExecutor(self.bundle, self.device, engines, self.spec, vram, pinnable)
        if find_spec("onnxruntime") is None:
            executor.stages.host = TorchHostPrograms(self.bundle)  # type: ignore[assignment]
        try:
            yield Pipeline.on(self.bundle, executor), executor
        finally:
            executor.close()

    def draw(self, pipeline: Pipeline, size: tuple[int, int]) -> Drawn:
        """Draws one picture; the prompt is encoded each time."""
        pipeline.forget_prompt()
        start, steps = time.perf_counter(), []
        for event in pipeline.stream(PROMPT, size=size, steps=self.steps, seed=SEED):
            if isinstance(event, StepEvent):
                steps.append(round(event.seconds, 5))
            elif isinstance(event, ImageEvent):
                seconds = round(time.perf_counter() - start, 3)
                return Drawn(np.asarray(event.latents), np.asarray(event.image), seconds, steps)
        raise RuntimeError("no picture came")

    def against_reference(self, drawn: Drawn) -> dict[str, Any]:
        """The largest and the mean difference from the `cpu` executor's picture, in levels of 255."""
        if self.reference is None:
            return {}
        if self.reference.shape != drawn.pixels.shape:
            return {"reference": f"is of shape {self.reference.shape}, not {drawn.pixels.shape}"}
        difference = np.abs(drawn.pixels.astype(np.int16) - self.reference.astype(np.int16))
        return {"max_difference": int(difference.max()), "mean_difference": round(float(difference.mean()), 4)}


def run(bench: Bench, size: tuple[int, int], budgets: list[int]) -> None:
    """All checks."""
    large = min(bench.device.memory()[0], 1 << 40) // 2 + CONTEXT_BYTES  # the rest is for torch's temporaries
    other = (size[0], max(32, size[1] // 32 * 16))
    drawn: dict[str, Drawn] = {}

    def first(pipeline: Pipeline, executor: TensorRtExecutor) -> dict[str, Any]:
        one = drawn["first"] = bench.draw(pipeline, size)
        plan = pipeline.prepare(Request(PROMPT, size=size, steps=bench.steps, seed=SEED)).plan
        stage = executor.stages._stages.get(Program.DENOISER)
        return {
            "ok": bool(np.isfinite(one.latents).all()),
            "picture_seconds": one.seconds,
            "steps": one.steps,
            "captured": bool(stage and stage.graphs),
            "peak": CONTEXT_BYTES + executor.peak_bytes,
            "planned": getattr(plan, "peak", None),
            **bench.against_reference(one),
        }

    def again(pipeline: Pipeline, size: tuple[int, int] = size, name: str = "first") -> dict[str, Any]:
        one = bench.draw(pipeline, size)
        known = drawn.setdefault(name, one)
        values = bench.against_reference(one) if name == "first" else {}
        latents = bool((one.latents == known.latents).all())
        times = {"picture_seconds": one.seconds, "steps": one.steps}
        return {"ok": one.same(known), "same_latents": latents, **times, **values}

    def release(pipeline: Pipeline, executor: TensorRtExecutor) -> dict[str, Any]:
        before = bench.device.memory()[0]
        pipeline.release()
        freed, left = bench.device.memory()[0] - before, executor.stages.tools.budget.used
        values = again(pipeline)
        return {**values, "freed": freed, "left": left, "ok": values["ok"] and left == 0 and freed > 0}

    def interrupted(pipeline: Pipeline, executor: TensorRtExecutor) -> dict[str, Any]:
        for event in pipeline.stream(PROMPT, size=size, steps=bench.steps, seed=SEED + 1):
            if isinstance(event, StepEvent):
                break
        return again(pipeline)

    def failing(pipeline: Pipeline, executor: TensorRtExecutor) -> dict[str, Any]:
        """An error while a step is queued, in the capture: all is freed, and the next picture is right."""
        pipeline.release()
        context, calls = TorchContext, [0]
        enqueue = context.enqueue

        def fail(self: Any, *arguments: Any) -> None:
            calls[0] += self._program.name == "final_layer"
            if calls[0] == 2:
                raise RuntimeError("as the check wants it to")
            enqueue(self, *arguments)

        context.enqueue = fail  # type: ignore[method-assign]
        try:
            bench.draw(pipeline, size)
        except RuntimeError as error:
            text = str(error)
        else:
            text = "no error"
        finally:
            context.enqueue = enqueue  # type: ignore[method-assign]
        left = executor.stages.tools.budget.used
        values = again(pipeline)
        return {**values, "said": text, "left": left, "ok": values["ok"] and left == 0 and "wants" in text}

    with bench.pipeline(large) as (pipeline, executor):
        bench.check("first picture", lambda: first(pipeline, executor))
        if "first" not in drawn:
            return
        bench.check("the same again, with stages loaded", lambda: again(pipeline))
        bench.check("another size", lambda: again(pipeline, other, "other"))
        bench.check("back to the first size", lambda: again(pipeline))
        bench.check("released, and again", lambda: release(pipeline, executor))
        bench.check("stopped after a step, and again", lambda: interrupted(pipeline, executor))
        bench.check("an error in the capture, and again", lambda: failing(pipeline, executor))
        sizes = ImageSizes.of(*_work(pipeline, size, bench.steps))
        needs = {program: stage_needs(program, bench.spec, bench.bundle.manifest.config, sizes) for program in STAGES}
        least = smallest_budget(needs, sizes)
        planned = pipeline.prepare(Request(PROMPT, size=size, steps=bench.steps, seed=SEED)).plan
        most = max(least, planned.stages[Program.DENOISER].nbytes + CONTEXT_BYTES)  # type: ignore[attr-defined]

    def uncaptured() -> dict[str, Any]:
        replay = StageDenoiser._replay
        StageDenoiser._replay = lambda self, stage, shapes: self._queue(stage, shapes, 1)  # type: ignore[method-assign]
        try:
            with bench.pipeline(large) as (pipeline, _):
                return again(pipeline)
        finally:
            StageDenoiser._replay = replay  # type: ignore[method-assign]

    def streamed(vram: int, pinnable: int) -> dict[str, Any]:
        with bench.pipeline(vram, pinnable) as (pipeline, executor):
            values, second = again(pipeline), again(pipeline)
            plan: Any = pipeline.prepare(Request(PROMPT, size=size, steps=bench.steps, seed=SEED)).plan
            stage, peak = plan.stages[Program.DENOISER], CONTEXT_BYTES + executor.peak_bytes
            whole = Program.DECODER in plan.stages and not plan.in_tiles  # otherwise, decoding rounds otherwise
            same = [one["ok"] if whole else one["same_latents"] for one in (values, second)]
            resident = {"resident": len(stage.resident), "blocks": len(stage.needs.blocks), "decoded": plan.how_decoded}
            seconds = {"second_steps": second["steps"], "vram": vram, "peak": peak, "pinnable": pinnable}
            return {**values, **resident, **seconds, "ok": all(same) and peak <= vram}

    bench.check("without a graph", uncaptured)
    for vram in budgets or [least, (least + most) // 2]:
        for pinnable in (0, 1 << 34):
            bench.check("weights streamed", lambda vram=vram, pinnable=pinnable: streamed(vram, pinnable))  # type: ignore[misc]
    bench.check("all freed", lambda: {"free": bench.device.memory()[0], "ok": True})


def _stand_in_for_psutil() -> None:
    """What the runtime asks of psutil, where it is not installed."""

    def virtual_memory() -> Any:
        lines = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {name: int(value.split()[0]) for name, value in lines}
        return SimpleNamespace(available=kib["MemAvailable"] << 10, total=kib["MemTotal"] << 10)

    module: Any = ModuleType("psutil")
    module.virtual_memory, module.cpu_count = virtual_memory, lambda logical=True: os.cpu_count()
    module.Error = OSError
    sys.modules["psutil"] = module


def _work(pipeline: Pipeline, size: tuple[int, int], steps: int) -> tuple[Any, int, int]:
    work = pipeline.prepare(Request(PROMPT, size=size, steps=steps, seed=SEED)).plan.work  # type: ignore[attr-defined]
    return work.geometry, work.tokens, 1


def _bytes(text: str) -> int:
    """An amount such as 600MiB or 1.5GiB."""
    unit = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[text[-3:]]
    return int(float(text[:-3]) * unit)


def _pixels(path: Path) -> np.ndarray[Any, Any]:
    if path.suffix == ".npy":
        return np.asarray(np.load(path))
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--reference", type=Path, metavar="PNG_OR_NPY")
    parser.add_argument("--write-reference", type=Path, metavar="PNG", help="draw it on the cpu executor, and end")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--vram", action="append", default=[], help="a budget; without any, two that stream weights")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that each check may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stand-in", action="store_true", help="run on the tests' stand-in device")
    given = parser.parse_args()
    if find_spec("psutil") is None:
        _stand_in_for_psutil()
    size, bundle = (given.size, given.size), Bundle.open(given.bundle)
    if given.write_reference:
        with Pipeline.from_bundle(given.bundle, "cpu") as pipeline:
            result = pipeline.generate(PROMPT, size=size, steps=given.steps, seed=SEED)
        result.images[0].save(given.write_reference)
        return 0
    if given.stand_in:
        stand_in = StandInDevice(limit=1 << 36)
        device: Device = stand_in
        memory: Memory = StandInMemory(stand_in)
    else:
        device, memory = CudaDevice(), CudaMemory()
    reference = _pixels(given.reference) if given.reference else None
    bench = Bench(bundle, device, memory, given.steps, given.limit, given.out, reference)
    precision = bundle.manifest.precision.value
    bench.write({"device": device.name, "torch": torch.__version__, "precision": precision, "size": given.size})
    run(bench, size, [_bytes(text) for text in given.vram])
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
