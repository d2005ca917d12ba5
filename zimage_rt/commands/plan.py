"""`zimage-rt plan`: what an image will take on a GPU, and what will be where, without one."""

import json
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.command_line.console import MemoryType, SizeType
from zimage_runtime.errors import BundleError

if TYPE_CHECKING:
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.manifest import Precision
    from zimage_runtime.executors.ort.device_plan import VramPlan
    from zimage_runtime.executors.tensorrt.plan import ResidencyPlan
    from zimage_runtime.model.geometry import ImageGeometry

_UNLIMITED = 1 << 60

_LABEL_WIDTH = 16
_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "portable")


@click.command(short_help="Predict the VRAM that an image takes.")
@click.argument("bundle", type=click.Path())
@click.option("--size", type=SizeType(), help="Of the image.  [default: the bundle's own]")
@click.option("--vram", type=MemoryType(), help="The budget, like 4GiB.  [default: enough for everything]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images in one step.")
@click.option("--tokens", type=click.IntRange(1, 512), default=128, show_default=True, help="Of the prompt.")
@click.option(
    "--executor",
    type=click.Choice(["tensorrt", "cuda"]),
    help="What is to generate.  [default: tensorrt where BUNDLE has its block programs, otherwise cuda]",
)
@click.option("--gpu", type=click.Choice(_GPUS), default="portable", show_default=True, help="What is to generate on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
def plan(
    bundle: str,
    size: tuple[int, int] | None,
    vram: int | None,
    batch: int,
    tokens: int,
    executor: str | None,
    gpu: str,
    as_json: bool,
) -> None:
    """Predict what an image generated from BUNDLE takes of a GPU's memory.

    BUNDLE is a directory, or the name of a bundle on the Hub, ORG/NAME. No GPU is needed: what TensorRT's engines take
    beside weights was measured when they were built, and what ONNX Runtime takes follows from the programs. A budget
    that is too small is refused with the smallest that would do. For cuda, it also tells what bundles of the same
    model in other precisions would take.
    """
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.hub import bundle_directory
    from zimage_runtime.executors.tensorrt.plan import gib
    from zimage_runtime.model.geometry import image_geometry

    opened = Bundle.open(bundle_directory(bundle))
    manifest = opened.manifest
    width, height = size or (manifest.defaults.width, manifest.defaults.height)
    geometry = image_geometry(width, height, manifest.config)
    budget = vram if vram is not None else _UNLIMITED
    chosen = executor or ("cuda" if manifest.engines is None else "tensorrt")
    if chosen == "tensorrt":
        made = _plan_tensorrt(opened, geometry, tokens, budget, batch, gpu)
        lines, document = _lines(made), _document(made, vram)
    else:
        from zimage_runtime.executors.ort.device_plan import other_peaks, plan_vram
        from zimage_runtime.machine.gpu_targets import GpuTarget

        capability = GpuTarget(gpu).capability
        planned = plan_vram(manifest, geometry, tokens, budget, batch, capability=capability)
        others = other_peaks(manifest, geometry, tokens, budget, batch, capability=capability)
        lines, document = _lines_of_cuda(planned), _document_of_cuda(planned, vram)
        lines += _lines_of_others(others, manifest.precision, planned, vram, capability)
        document["other_bundles"] = {precision.value: peak for precision, peak in others.items()}
    if as_json:
        click.echo(json.dumps({"executor": chosen, **document}, indent=2))
        return
    said = [
        ("image", f"{width}x{height}, {batch} at once, a prompt of {tokens} tokens"),
        ("executor", chosen),
        ("budget", "as much as it takes" if vram is None else gib(vram)),
    ]
    for label, text in said + lines:
        click.echo(f"{label:<{_LABEL_WIDTH}} {text}")


def _plan_tensorrt(
    bundle: "Bundle", geometry: "ImageGeometry", tokens: int, budget: int, batch: int, gpu: str
) -> "ResidencyPlan":
    from zimage_runtime.executors.tensorrt.engine_store import read_catalog
    from zimage_runtime.executors.tensorrt.plan import plan_residency
    from zimage_runtime.executors.tensorrt.stage_sizes import ImageSizes
    from zimage_runtime.machine.gpu_targets import GpuTarget

    spec = read_catalog(bundle).variants.get(GpuTarget(gpu).variant)
    if spec is None:
        raise BundleError(f"{bundle.root}: has no block programs for {gpu}; add them with zimage-export engines")
    return plan_residency(spec, bundle.manifest.config, ImageSizes.of(geometry, tokens, batch), budget)


def _lines_of_others(
    peaks: "dict[Precision, int]",
    precision: "Precision",
    plan: "VramPlan",
    vram: int | None,
    capability: tuple[int, int] | None,
) -> list[tuple[str, str]]:
    from zimage_runtime.executors.ort.other_precisions import advised
    from zimage_runtime.executors.tensorrt.plan import gib

    def told(peak: int) -> str:
        fits = "" if vram is None else ", fits" if peak <= vram else ", does not fit"
        return f"{gib(peak, up=True)}{fits}"

    lines = [("other bundles", "; ".join(f"{other} {told(peak)}" for other, peak in peaks.items()))]
    best = advised({**peaks, precision: plan.peak}, plan.budget, capability)
    if vram is not None and best not in (None, precision):
        lines.append(("advice", f"a bundle in {best} fits, too, and is nearer to the original model"))
    return lines


def _lines_of_cuda(plan: "VramPlan") -> list[tuple[str, str]]:
    from zimage_runtime.executors.ort.device_plan import CONTEXT
    from zimage_runtime.executors.tensorrt.plan import gib

    together = "all weights stay loaded" if plan.keep_all else "stages take turns"
    return [
        ("peak", f"{gib(plan.peak, up=True)}, {gib(CONTEXT)} of it assumed for CUDA itself; {together}"),
        *(
            (program.value, f"{gib(s.total)}: weights {gib(s.weights)}, activations {gib(s.activations)}")
            for program, s in plan.stages.items()
        ),
        *(("note", note) for note in plan.notes),
    ]


def _document_of_cuda(plan: "VramPlan", vram: int | None) -> dict[str, Any]:
    from zimage_runtime.executors.ort.device_plan import CONTEXT

    return {
        "budget": vram,
        "peak": plan.peak,
        "context": CONTEXT,
        "keep_all": plan.keep_all,
        "tiled": plan.tiled,
        "denoiser": plan.denoiser,
        "stages": {
            program.value: {"bytes": stage.total, "weights": stage.weights, "activations": stage.activations}
            for program, stage in plan.stages.items()
        },
    }


def _lines(plan: "ResidencyPlan") -> list[tuple[str, str]]:
    from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES, describe, gib

    together = "all stages stay loaded" if plan.keep_all else "stages take turns"
    return [
        ("peak", f"{gib(plan.peak, up=True)}, {gib(CONTEXT_BYTES)} of it assumed for CUDA itself; {together}"),
        *((program.value, text) for program, text in describe(plan)),
        ("step", "one CUDA graph" if plan.captured else "block by block, copies beside computing"),
    ]


def _document(plan: "ResidencyPlan", vram: int | None) -> dict[str, Any]:
    from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES

    return {
        "budget": vram,
        "peak": plan.peak,
        "context": CONTEXT_BYTES,
        "keep_all": plan.keep_all,
        "captured": plan.captured,
        "stages": {
            program.value: {
                "bytes": stage.nbytes,
                "weights": stage.weight_bytes,
                "scratch": stage.needs.scratch,
                "blocks": len(stage.needs.blocks),  # of a decoder in tiles, those that work on whole maps
                "resident": sorted(stage.resident),
            }
            for program, stage in plan.stages.items()
        },
        "in_tiles": {"decoder": {"smallest_budget": plan.whole_decoder}} if plan.in_tiles else {},
        "on_cpu": {program.value: {"smallest_budget": nbytes} for program, nbytes in plan.on_host.items()},
    }
