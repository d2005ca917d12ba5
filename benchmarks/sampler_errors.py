"""Samplers on the demo model: how far the image's latents are from the flow's own solution, by steps and forwards.

    python benchmarks/sampler_errors.py [--images 4] [--steps 4 8 16 32 64]

The solution is Heun's in 1000 steps. Only samplers that add no noise approach it. All take the model's own schedule.
"""

import math

import numpy as np

from zimage_rt import Pipeline, demo_bundle
from zimage_rt.bench.accuracy import relative_error
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.steps import open_session
from zimage_rt.bench.tables import markdown_table
from zimage_runtime.arrays import FloatArray
from zimage_runtime.model.config import SchedulerConfig
from zimage_runtime.model.sampling_names import SamplerName
from zimage_runtime.model.schedule import Schedule, schedule_through
from zimage_runtime.pipeline import Request
from zimage_runtime.sampling.samplers import make_solver
from zimage_runtime.sampling.solver import Velocity

PROMPTS = (
    "a red circle left of a blue square",
    "白色背景上的一个红色心形",
    "a large purple star on a cream background",
    "an orange circle above a green square, gray background",
)
SAMPLERS = tuple(name for name in SamplerName if not name.adds_noise)
SOLUTION_STEPS = 1000

Errors = dict[SamplerName, dict[int, float]]
"""By sampler, then by steps."""


def measure(run: Run) -> Document:
    """Solves and compares; errors of images lie factors apart, so their mean is geometric."""
    with Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        requests = list(enumerate(PROMPTS[: run.options.images]))
        images = [errors(pipeline, prompt, seed, run.options.steps) for seed, prompt in requests]

    def mean(name: SamplerName, count: int) -> float:
        return math.exp(sum(math.log(one[name][count]) for one in images) / len(images))

    table = {name.value: {str(count): mean(name, count) for count in run.options.steps} for name in SAMPLERS}
    return {"images": len(images), "solution_steps": SOLUTION_STEPS, "errors": table}


def errors(pipeline: Pipeline, prompt: str, seed: int, steps: list[int]) -> Errors:
    """The relative error of each sampler's latents after each number of steps, for one image."""
    job = pipeline.prepare(Request(prompt, seed=seed))
    session, config = open_session(job), pipeline.bundle.manifest.config.scheduler
    hidden = pipeline.hidden_states(session, job.ids)
    start = pipeline.initial_latents(job.geometry, job.seeds)

    def solved(name: SamplerName, count: int) -> FloatArray:
        schedule = evenly(count, config)
        denoiser: Velocity = session.denoiser(pipeline.conditioning(job.geometry, schedule, hidden))
        solver, latents = make_solver(name, schedule, _no_noise), start
        for step in range(schedule.steps):
            latents = solver.step(latents, step, denoiser)
        return latents

    solution = solved(SamplerName.HEUN, SOLUTION_STEPS)
    return {name: {count: relative_error(solved(name, count), solution) for count in steps} for name in SAMPLERS}


def evenly(steps: int, config: SchedulerConfig) -> Schedule:
    """The model's own schedule, of any number of steps."""
    sigmas = np.linspace(1, 1 / steps, steps, dtype=np.float32)
    return schedule_through(config.shift * sigmas / (1 + (config.shift - 1) * sigmas), config)


def _no_noise() -> FloatArray:
    raise AssertionError("a sampler that adds none asked for noise")


def forwards(name: str, steps: int) -> int:
    """Of the transformer: Heun's method takes two for each step but the last."""
    return 2 * steps - 1 if name == SamplerName.HEUN else steps


def page(report: Document) -> list[str]:
    """The table: samplers down, steps across, forwards in brackets."""
    steps = list(next(iter(report["errors"].values())))
    rows = [
        [f"`{name}`", *(f"{error:.2g} ({forwards(name, int(count))})" for count, error in found.items())]
        for name, found in report["errors"].items()
    ]
    return [
        "Samplers on the demo model",
        f"Error of the latents against {report['solution_steps']} steps of Heun's method: norm of the difference over "
        f"the norm, geometric mean of {report['images']} images of 128x128. In brackets: forwards of the transformer.",
        markdown_table(["sampler", *(f"{count} steps" for count in steps)], rows),
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("zimage-rt", "onnxruntime", "numpy"),
    options={
        "images": Option(len(PROMPTS), "prompts, each with a seed of its own"),
        "steps": Option([4, 8, 16, 32, 64], "numbers of steps"),
    },
)

if __name__ == "__main__":
    SCRIPT.main()
