"""How much memory each program takes, against what `zimage_runtime.executors.ort.cpu_plan` says it will take.

Every point runs in a process of its own, twice over (pictures are encoded and decoded once), on a bundle of random
weights whose activations dwarf its weights. What counts is anonymous memory: mapped weights are the page cache's,
which yields.

    python benchmarks/memory_model.py --work out/benchmarks
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Peak,
    describe,
    machine,
    markdown_table,
    measure_child,
    mib,
    prepared_bundle,
    python_child,
    write_results,
)

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


def points(quick: bool, large: bool) -> Iterator[Point]:
    """The points, from a bare process to the largest picture."""
    yield Point("base")
    for low_memory in (False, True):
        for tokens in (32, 512):
            yield Point("text_encoder", tokens=tokens, low_memory=low_memory)
            yield Point("caption", tokens=tokens, low_memory=low_memory)
        yield Point("modulation", low_memory=low_memory)
        for side in (256,) if quick else (256, 512, 1024):
            yield Point("denoiser", side, side, 32, low_memory=low_memory)
        for side in (128,) if quick else (256, 512):
            yield Point("decoder", side, side, low_memory=low_memory)
            yield Point("encoder", side, side, low_memory=low_memory)
    if not quick:
        yield Point("denoiser", 512, 512, 512, batch=2)
    if large:
        yield Point("denoiser", 1536, 1024, 300)
        yield Point("decoder", 1024, 1024)
        yield Point("decoder", 1024, 1024, low_memory=True)


def scale() -> Any:
    """Wide enough for activations to show, shallow enough for weights not to; the VAE is the published one."""
    from dataclasses import replace

    from zimage_export.synthetic.checkpoint import SMALL, Scale

    small = SMALL.config
    return Scale(
        replace(
            small,
            text_encoder=replace(
                small.text_encoder,
                hidden_size=512,
                num_hidden_layers=3,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=128,
                intermediate_size=1536,
            ),
            transformer=replace(
                small.transformer,
                dim=768,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=6,
                cap_feat_dim=512,
                axes_dims=(32, 48, 48),
            ),
            vae=replace(
                small.vae,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                norm_num_groups=32,
                sample_size=512,
            ),
        )
    )


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


def child(bundle_path: str, point: Point) -> None:
    """What the measured process does: imports what `zimage-rt run` imports, loads one program and runs it."""
    import PIL.Image  # noqa: F401

    import zimage_runtime.pipeline  # noqa: F401
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.executors.ort.host_programs import HostPrograms

    bundle = Bundle.open(bundle_path)
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
    from zimage_runtime.executors.protocol import Work
    from zimage_runtime.model.geometry import image_geometry

    work = Work(
        geometry=image_geometry(point.width, point.height, manifest.config),
        tokens=point.tokens,
        batch=point.batch,
        encodes=point.program == Program.ENCODER,
    )
    plan = plan_memory(manifest, work, low_memory=point.low_memory, available=1 << 50)
    base = plan.peak - max(plan.programs.values())
    return base if point.program == "base" else base + plan.programs[Program(point.program)]


def measure(bundle: Path, point: Point) -> Peak:
    """Peak memory of a fresh process at a point."""
    return measure_child(python_child(__file__, {"bundle": str(bundle), **asdict(point)}))[0]


def report(rows: list[dict[str, Any]], description: dict[str, Any]) -> str:
    """The results as a page."""
    table = markdown_table(
        ["program", "measured, MiB", "mapped files, MiB", "predicted, MiB", "predicted / measured"],
        [(r["label"], mib(r["anonymous"]), mib(r["file"]), mib(r["predicted"]), f"{r['ratio']:.2f}") for r in rows],
    )
    return "\n".join(
        [
            "# Memory of each program: measured and predicted",
            "",
            describe(description) + ".",
            "Random weights; transformer of width 768, text encoder of width 512, the published VAE.",
            "Measured is the peak of anonymous memory of a fresh process that ran the program twice, "
            "decoder and encoder once.",
            "The base is for a tokenizer of the published size, which takes 102 MiB and is not loaded here.",
            "Made by `python benchmarks/memory_model.py`.",
            "",
            table,
        ]
    )


def run(work: Path, chosen: list[Point], bundle: Path | None, out: Path | None) -> None:
    """Measures every point, then prints and writes the comparison."""
    from zimage_runtime.bundle.bundle import Bundle

    work.mkdir(parents=True, exist_ok=True)
    path = bundle or prepared_bundle(work, "memory", scale())[1]
    manifest = Bundle.open(path).manifest
    rows = []
    for point in chosen:
        peak, expected = measure(path, point), predicted(manifest, point)
        row = {"label": point.label, **asdict(point), **asdict(peak), "predicted": expected}
        row["ratio"] = expected / peak.anonymous
        rows.append(row)
        print(f"{point.label}: {mib(peak.anonymous)} MiB, predicted {mib(expected)} MiB", file=sys.stderr)
    description = machine("numpy", "onnxruntime")
    page = report(rows, description)
    print(page)
    if out:
        write_results("memory_model", {"machine": description, "points": rows}, page, out)


def main() -> None:
    """The command line."""
    from common import RESULTS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--work", type=Path, default=Path("out/benchmarks"), help="where checkpoint and bundle are kept"
    )
    parser.add_argument("--bundle", type=Path, help="measure this bundle instead of a synthetic one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points; nothing is written")
    parser.add_argument("--large", action="store_true", help="the largest points too: an hour on two old cores")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        data = json.loads(options.child)
        child(data.pop("bundle"), Point(**data))
    else:
        chosen = list(points(options.quick, options.large))
        run(options.work, chosen, options.bundle, None if options.quick else options.out)


if __name__ == "__main__":
    main()
