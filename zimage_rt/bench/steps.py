"""Single denoising steps as calls that can take turns: ours, of a bundle, and diffusers', of its checkpoint.

All variants take the same latents and hidden states. Refining the caption is part of diffusers' step, and not of ours.
A call gives the velocity of one step, [1, channels, height / 8, width / 8].
"""

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runtime.arrays import FloatArray
from zimage_runtime.machine.cores import thread_count
from zimage_runtime.model.geometry import ImageGeometry

from .accuracy import relative_error
from .children import one_line

if TYPE_CHECKING:
    from zimage_runtime.pipeline import Pipeline

PROMPT, SEED = "a lighthouse on a cliff at dusk, oil painting", 7

Call = Callable[[], FloatArray]
Calls = dict[str, Call]

_SESSIONS = ExitStack()
"""Open until the process ends."""


def open_session(job: Any) -> Any:
    """A session of a prepared job whose stages are called one by one."""
    return _SESSIONS.enter_context(job.executor.session(job.plan))


@dataclass(frozen=True)
class Step:
    """One step of ours, ready to run again and again."""

    call: Call
    latents: FloatArray
    hidden_states: FloatArray
    timesteps: FloatArray
    geometry: ImageGeometry
    tokens: int  # of the prompt


def our_step(
    pipeline: "Pipeline",
    size: tuple[int, int],
    *,
    prompt: str = PROMPT,
    steps: int = 8,
    number: int = 0,
    branches: Any = None,
) -> Step:
    """One step of a pipeline; `number` says which. Every bundle has its own hidden states and modulation."""
    from zimage_runtime.pipeline import Request

    job = pipeline.prepare(Request(prompt, size=size, steps=steps, seed=SEED))
    latents, session = pipeline.initial_latents(job.geometry, job.seeds), open_session(job)
    hidden = pipeline.hidden_states(session, job.ids)
    denoiser = session.denoiser(pipeline.conditioning(job.geometry, job.schedule, hidden, branches))
    return Step(
        lambda: denoiser(latents, number), latents, hidden, job.schedule.timesteps[:1], job.geometry, len(job.ids)
    )


def diffusers_pipelines(checkpoint: Path, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """diffusers' pipelines by type, and its transformers by variant, as many threads as we use for both.

    `kinds` are names that end in ``eager fp32``, ``compiled bf16`` and the like.
    """
    import torch
    from diffusers import ZImagePipeline

    torch.set_num_threads(thread_count())
    pipelines: dict[str, Any] = {}
    transformers: dict[str, Any] = {}
    for kind in kinds:
        way, dtype = kind.split()[-2:]
        if dtype not in pipelines:
            loaded = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            pipelines[dtype] = ZImagePipeline.from_pretrained(str(checkpoint), dtype=loaded)
            pipelines[dtype].set_progress_bar_config(disable=True)
        transformer = pipelines[dtype].transformer
        transformers[kind] = torch.compile(transformer) if way == "compiled" else transformer
    return pipelines, transformers


def diffusers_steps(transformers: Mapping[str, Any], ours: Step) -> Calls:
    """The same step by each of diffusers' transformers."""
    import torch

    hidden, timestep = torch.from_numpy(ours.hidden_states[0]), torch.from_numpy(ours.timesteps)

    def call_of(transformer: Any) -> Call:
        dtype = next(transformer.parameters()).dtype
        image = torch.from_numpy(ours.latents).to(dtype).transpose(0, 1)  # [channels, 1, h, w]

        def call() -> FloatArray:
            with torch.no_grad():
                (output,) = transformer([image], timestep, [hidden.to(dtype)], return_dict=False)[0]
            velocity: FloatArray = (-output.transpose(0, 1)).float().numpy()
            return velocity

        return call

    return {name: call_of(transformer) for name, transformer in transformers.items()}


def judged(
    calls: Calls, references: Sequence[str], bounds: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, str]]:
    """Runs each call once. Returns errors against the first of `references` that ran, and what failed, and why.

    A call that raises is taken out of `calls`; one whose error is beyond its bound fails and stays.
    """
    outputs: dict[str, FloatArray] = {}
    failed: dict[str, str] = {}
    for name, call in list(calls.items()):
        start = time.perf_counter()
        try:
            outputs[name] = call()
        except Exception as error:  # a compiler that fails, or a type that a kernel lacks
            failed[name] = one_line(error)
            del calls[name]
        print(f"{name}: first call {time.perf_counter() - start:.1f} s", file=sys.stderr)
    reference = next(outputs[name] for name in references if name in outputs)
    errors = {name: relative_error(output, reference) for name, output in outputs.items()}
    for name, found in errors.items():
        if name in bounds and not found <= bounds[name]:
            failed[name] = f"error {found:.2g} is more than {bounds[name]:g}"
    return errors, failed


@contextmanager
def profiling(folder: Path) -> Iterator[None]:
    """Sessions of ONNX Runtime that are made meanwhile write a profile to `folder`."""
    import onnxruntime

    made = onnxruntime.SessionOptions

    class Profiled(made):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True
            self.profile_file_prefix = f"{folder}/{len(list(folder.iterdir()))}"

    onnxruntime.SessionOptions = Profiled
    try:
        yield
    finally:
        onnxruntime.SessionOptions = made


def step_profile(bundle: Path, size: tuple[int, int], runs: int) -> dict[str, float]:
    """Milliseconds of a step by operator, the median of a few steps, from ONNX Runtime's own profile."""
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.executors.ort.cpu import OrtCpuExecutor
    from zimage_runtime.model.programs import Program
    from zimage_runtime.pipeline import Pipeline

    with tempfile.TemporaryDirectory() as folder, profiling(Path(folder)):
        executor = OrtCpuExecutor(Bundle.open(bundle))
        pipeline = Pipeline.on(executor.bundle, executor)
        step = our_step(pipeline, size)
        for _ in range(runs + 1):
            step.call()
        session = executor.programs._sessions[Program.DENOISER]
        events = json.loads(Path(session.end_profiling()).read_text())
        pipeline.release()
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    per_run = len(nodes) // (runs + 1)
    totals: list[Counter[str]] = [Counter() for _ in range(runs)]
    for index, event in enumerate(nodes[per_run : per_run * (runs + 1)]):
        totals[index // per_run][event["args"]["op_name"]] += event["dur"] / 1e3
    return {name: statistics.median(total[name] for total in totals) for name in totals[0]}
