"""`zimage-rt plan`: what a picture will take on a GPU, and what will be where, without one."""

import json
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.console import MemoryType, SizeType
from zimage_runtime.errors import BundleError

if TYPE_CHECKING:
    from zimage_runtime.tensorrt.residency import ResidencyPlan

_LABEL_WIDTH = 16
_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "portable")


@click.command(short_help="Predict the VRAM that a picture takes with TensorRT.")
@click.argument("bundle", type=click.Path())
@click.option("--size", type=SizeType(), help="Of the picture.  [default: the bundle's own]")
@click.option("--vram", type=MemoryType(), help="The budget, like 4GiB.  [default: enough for everything]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Pictures in one step.")
@click.option("--tokens", type=click.IntRange(1, 512), default=128, show_default=True, help="Of the prompt.")
@click.option("--gpu", type=click.Choice(_GPUS), default="portable", show_default=True, help="The GPU's generation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
def plan(
    bundle: str, size: tuple[int, int] | None, vram: int | None, batch: int, tokens: int, gpu: str, as_json: bool
) -> None:
    """Predict what a picture drawn from BUNDLE with the tensorrt executor takes of a GPU's memory.

    BUNDLE is a directory, or the name of a bundle on the Hub, ORG/NAME. No GPU is needed: what engines take beside
    weights was measured when they were built. A budget that is too small is refused with the smallest that would do.
    """
    from zimage_runtime.bundle import Bundle
    from zimage_runtime.geometry import picture_geometry
    from zimage_runtime.hub import bundle_directory
    from zimage_runtime.tensorrt.residency import plan_residency
    from zimage_runtime.tensorrt.stages import PictureSizes
    from zimage_runtime.tensorrt.store import read_catalog
    from zimage_runtime.tensorrt.targets import Gpu

    opened = Bundle.open(bundle_directory(bundle))
    manifest = opened.manifest
    spec = read_catalog(opened).variants.get(Gpu(gpu).variant)
    if spec is None:
        raise BundleError(f"{opened.root}: has no block programs for {gpu}; add them with zimage-export engines")
    width, height = size or (manifest.defaults.width, manifest.defaults.height)
    sizes = PictureSizes.of(picture_geometry(width, height, manifest.config), tokens, batch)
    made = plan_residency(spec, manifest.config, sizes, vram if vram is not None else 1 << 60)
    if as_json:
        click.echo(json.dumps(_document(made, vram), indent=2))
    else:
        for label, text in _lines(made, (width, height), tokens, batch, vram):
            click.echo(f"{label:<{_LABEL_WIDTH}} {text}")


def _lines(
    plan: "ResidencyPlan", size: tuple[int, int], tokens: int, batch: int, vram: int | None
) -> list[tuple[str, str]]:
    from zimage_runtime.tensorrt.residency import CONTEXT_BYTES, describe, gib

    together = "all stages stay loaded" if plan.keep_all else "stages take turns"
    return [
        ("picture", f"{size[0]}x{size[1]}, {batch} at once, a prompt of {tokens} tokens"),
        ("budget", "as much as it takes" if vram is None else gib(vram)),
        ("peak", f"{gib(plan.peak, up=True)}, {gib(CONTEXT_BYTES)} of it assumed for CUDA itself; {together}"),
        *((program.value, text) for program, text in describe(plan)),
        ("step", "one CUDA graph" if plan.captured else "block by block, copies beside computing"),
    ]


def _document(plan: "ResidencyPlan", vram: int | None) -> dict[str, Any]:
    from zimage_runtime.tensorrt.residency import CONTEXT_BYTES

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
                "blocks": len(stage.needs.blocks),
                "resident": sorted(stage.resident),
            }
            for program, stage in plan.stages.items()
        },
    }
