"""`zimage-rt plan`: what an image will take of the memory, and what will be where, without loading anything."""

import json
from pathlib import Path

import click

from zimage_runtime.command_line.console import MemoryType, SizeType
from zimage_runtime.executors.registry import EXECUTORS

_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "portable")


@click.command(short_help="Predict the memory that an image takes.")
@click.argument("bundle", type=click.Path())
@click.option("--size", type=SizeType(), help="Of the image.  [default: the bundle's own]")
@click.option("--vram", type=MemoryType(), help="The GPU's memory, or for cpu the machine's.  [default: enough]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images in one step.")
@click.option("--tokens", type=click.IntRange(1, 512), default=128, show_default=True, help="Of the prompt.")
@click.option("--guided", is_flag=True, help="With guidance: a negative prompt of as many tokens.")
@click.option("--controlnet", type=click.Path(path_type=Path), help="With a ControlNet: its folder.")
@click.option("--lora", "loras", multiple=True, metavar="FILE[:WEIGHT]", help="As for run; may be given again.")
@click.option(
    "--executor",
    type=click.Choice([*EXECUTORS]),
    help="What runs it.  [default: tensorrt where BUNDLE has its block programs, otherwise cuda]",
)
@click.option("--gpu", type=click.Choice(_GPUS), default="portable", show_default=True, help="Which generation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
def plan(
    bundle: str,
    size: tuple[int, int] | None,
    vram: int | None,
    batch: int,
    tokens: int,
    guided: bool,
    controlnet: Path | None,
    loras: tuple[str, ...],
    executor: str | None,
    gpu: str,
    as_json: bool,
) -> None:
    """Predict what an image from BUNDLE takes of a GPU's memory or, for the CPU, of the machine's.

    BUNDLE is a directory or a Hub id, ORG/NAME. No GPU is needed: what TensorRT's engines take besides weights was
    measured when they were built, and what ONNX Runtime takes follows from the programs. A budget that is too small is
    refused with the smallest that would do. For cuda, it also shows what bundles of the same model in other precisions
    would take.
    """
    from zimage_runtime.adapters.branches import BranchSizes
    from zimage_runtime.adapters.given import given_loras
    from zimage_runtime.adapters.shelf import LoraShelf
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.controlnet import ControlNet
    from zimage_runtime.bundle.hub import bundle_directory
    from zimage_runtime.executors.choose import predicted
    from zimage_runtime.executors.plan_lines import labelled
    from zimage_runtime.executors.protocol import UNLIMITED, Hardware, Work
    from zimage_runtime.model.geometry import image_geometry
    from zimage_runtime.units import gib

    opened = Bundle.open(bundle_directory(bundle))
    manifest = opened.manifest
    width, height = size or (manifest.defaults.width, manifest.defaults.height)
    net = None if controlnet is None else ControlNet.open(controlnet)
    if net is not None:
        net.manifest.config.check_fits(manifest.config.transformer, net.root)
    branches = BranchSizes.of(LoraShelf(opened).open(given_loras(loras)))
    work = Work(
        geometry=image_geometry(width, height, manifest.config),
        tokens=tokens,
        guided=guided,
        batch=batch,
        steps=manifest.defaults.steps,
        encodes=net is not None,
        control=net,
        branches=branches.nbytes or None,
        branch_rank=branches.rank,
        branch_products=branches.products,
    )
    chosen = executor or ("cuda" if manifest.engines is None or net is not None else "tensorrt")
    hardware = Hardware(memory=UNLIMITED if vram is None else vram, gpu=gpu)
    planned = predicted(chosen, opened, work, hardware)
    if as_json:
        click.echo(json.dumps({"executor": chosen, "budget": vram, **planned.document()}, indent=2))
        return
    click.echo(
        labelled(
            "image", f"{width}x{height}, {batch} at once, {'two prompts' if guided else 'a prompt'} of {tokens} tokens"
        )
    )
    click.echo(labelled("executor", chosen))
    click.echo(labelled("budget", "as much as it takes" if vram is None else gib(vram, 2)))
    for line in planned.lines():
        click.echo(line)
