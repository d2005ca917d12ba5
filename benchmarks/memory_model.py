"""How much memory each program takes, against what `zimage_runtime.executors.ort.cpu_plan` says it will take.

Every point runs in a process of its own, twice over (images are encoded and decoded once), on a bundle of random
weights whose activations dwarf its weights. What counts is anonymous memory: mapped weights are the page cache's,
which yields.

    python benchmarks/memory_model.py --work out/benchmarks
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zimage_rt.bench.children import Answer, measure_child, script_child
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.synthetic import memory_scale, prepared
from zimage_rt.bench.tables import column_table, mib
from zimage_runtime.model.programs import SIGNATURES, Program

_RUNS = 2  # the second run may allocate otherwise than the first


@dataclass(frozen=True)
class Point:
    """One program at one size. `program` is a program's name, or "base" for a process that runs none."""

    program: str
    width: int = 512
    height: int = 512
    tokens: int = 32
    batch: int = 1
    low_memory: bool = False

    @property
    def label(self) -> str:
        """The point in a few words."""
        size = f" {self.width}x{self.height}" if self.program in ("denoiser", "decoder", "encoder") else ""
        tokens = f" {self.tokens} tokens" if self.program not in ("decoder", "encoder", "modulation", "base") else ""
        batch = f" batch {self.batch}" if self.batch > 1 else ""
        return f"{self.program}{size}{tokens}{batch}{' low-memory' if self.low_memory else ''}"

    def work(self, config: Any) -> Any:
        """The work of an image at this point, as plans take it."""
        from zimage_runtime.executors.protocol import Work
        from zimage_runtime.model.geometry import image_geometry

        geometry, encodes = image_geometry(self.width, self.height, config), self.program == Program.ENCODER
        return Work(geometry=geometry, tokens=self.tokens, batch=self.batch, encodes=encodes)


def points(trial: bool, large: bool) -> Iterator[Point]:
    """The points, from a bare process to the largest image."""
    yield Point("base")
    for low_memory in (False, True):
        for tokens in (32, 512):
            yield Point("text_encoder", tokens=tokens, low_memory=low_memory)
            yield Point("caption", tokens=tokens, low_memory=low_memory)
        yield Point("modulation", low_memory=low_memory)
        for side in (256,) if trial else (256, 512, 1024):
            yield Point("denoiser", side, side, 32, low_memory=low_memory)
        for side in (128,) if trial else (256, 512):
            yield Point("decoder", side, side, low_memory=low_memory)
            yield Point("encoder", side, side, low_memory=low_memory)
    if not trial:
        yield Point("denoiser", 512, 512, 512, batch=2)
    if large:
        yield Point("denoiser", 1536, 1024, 300)
        yield Point("decoder", 1024, 1024)
        yield Point("decoder", 1024, 1024, low_memory=True)


def feeds(config: Any, point: Point) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Random inputs of the shapes in the program's contract."""
    from zimage_runtime.model.geometry import image_geometry, padded

    geometry = image_geometry(point.width, point.height, config)
    text = point.program == Program.TEXT_ENCODER
    sizes = {
        "batch": point.batch,
        "tokens": point.tokens,
        "caption_tokens": padded(point.tokens),
        "image_tokens": geometry.image_tokens,
        "steps": 8,
        "latent_h": geometry.latent_height,
        "latent_w": geometry.latent_width,
        "height": geometry.height,
        "width": geometry.width,
        "hidden_size": config.text_encoder.hidden_size,
        "half_head": (config.text_encoder if text else config.transformer).head_dim // 2,
        "dim": config.transformer.dim,
        "blocks": config.transformer.modulated_blocks,
        "in_channels": config.transformer.in_channels,
        "latent_channels": config.vae.latent_channels,
    }
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal([sizes[d] if isinstance(d, str) else d for d in shape], dtype=np.float32)
        for name, shape in SIGNATURES[Program(point.program)].inputs.items()
    }


def child(options: Answer) -> None:
    """What the measured process does: imports what `zimage-rt run` imports, loads one program and runs it."""
    import PIL.Image  # noqa: F401

    import zimage_runtime.pipeline  # noqa: F401
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.executors.ort.host_programs import HostPrograms

    bundle, point = Bundle.open(options["bundle"]), Point(**options["point"])
    if point.program == "base":
        import onnxruntime  # noqa: F401

        return
    programs = HostPrograms(bundle, low_memory=point.low_memory)
    inputs = feeds(bundle.manifest.config, point)
    for _ in range(1 if point.program in (Program.DECODER, Program.ENCODER) else _RUNS):
        programs.run(Program(point.program), inputs)


def predicted(manifest: Any, point: Point) -> int:
    """What the plan says for the point's program alone: the base, weights and activations."""
    from zimage_runtime.executors.ort.cpu_plan import plan_memory

    work = point.work(manifest.config)
    plan = plan_memory(manifest, work, low_memory=point.low_memory, available=1 << 50)
    base = plan.peak - max(plan.programs.values())
    return base if point.program == "base" else base + plan.programs[Program(point.program)]


def measure(run: Run) -> Document:
    """Every point: its peak, and the plan's."""
    from zimage_runtime.bundle.bundle import Bundle

    path = run.options.bundle or prepared(run.work, "memory", memory_scale())[1]
    manifest, rows = Bundle.open(path).manifest, []
    for point in points(run.trial, run.options.large):
        peak, _ = measure_child(script_child(__file__, "point", {"bundle": str(path), "point": asdict(point)}))
        expected = predicted(manifest, point)
        row = {"label": point.label, **asdict(point), **asdict(peak), "predicted": expected}
        rows.append(row | {"ratio": expected / peak.anonymous})
        run.note(f"{point.label}: {mib(peak.anonymous)} MiB, predicted {mib(expected)} MiB")
    return {"points": rows}


def page(document: Document) -> list[str]:
    """Measured beside predicted."""
    columns = {
        "program": "{label}",
        "measured, MiB": lambda row: mib(row["anonymous"]),
        "mapped files, MiB": lambda row: mib(row["file"]),
        "predicted, MiB": lambda row: mib(row["predicted"]),
        "predicted / measured": "{ratio:.2f}",
    }
    return [
        "Memory of each program: measured and predicted",
        "Random weights; transformer of width 768, text encoder of width 512, the published VAE. Measured is the peak "
        "of anonymous memory of a fresh process that ran the program twice, decoder and encoder once. The base is for "
        "a tokenizer of the published size, which takes 102 MiB and is not loaded here.",
        column_table(columns, document["points"]),
    ]


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("numpy", "onnxruntime"),
    work="1 GB",
    trial=True,
    options={
        "bundle": Option(None, "measure this bundle instead of a synthetic one", kind=Path),
        "large": Option(False, "the largest points too: an hour on two old cores"),
    },
    children={"point": child},
)

if __name__ == "__main__":
    SCRIPT.main()
