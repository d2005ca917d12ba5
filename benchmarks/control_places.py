"""Do shapes land where a map of edges puts them? The demo model with its ControlNet and without, on held-out maps.

    PYTHONPATH=. python benchmarks/control_places.py [--with-diffusers] [--controlnet DIR] [--maps 50] [--scale 0.75]

Prompts name the objects and not their places; each asks for a colour of a shape that no training picture showed. An
object has landed if an area of one colour overlaps the inside of its outline enough. A map counts if all its objects
have. zimage-rt generates the images, with the bundle that ships and the programs that control needs, or diffusers does.
zimage-rt's sheet shows each map above its images with the ControlNet and without.
"""

import argparse
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import RESULTS, describe, machine, markdown_table, write_results
from numpy.typing import NDArray
from PIL import Image

from demo_model.landing import OVERLAP, Landing, Request, judge_landing, map_requests
from zimage_export.controlnet import ControlOptions, export_controlnet
from zimage_export.programs import add_programs
from zimage_export.source.checkpoint import DEMO
from zimage_rt import Pipeline, demo_bundle
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.progress import Progress

CONTROLNET = DEMO.with_name("tiny_controlnet")
COLUMNS, GAP = 10, 4
SHEET = "control_places.png"
Pixels = NDArray[np.uint8]
Generate = Callable[[Request, int, bool], Pixels]
"""A request, a seed, and whether with the ControlNet → the image [height, width, 3]."""


def main() -> None:
    """Generates, judges, and writes the report and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with-diffusers", action="store_true", help="as the reference; its report is named so")
    parser.add_argument("--controlnet", type=Path, default=CONTROLNET, help="in diffusers' layout")
    parser.add_argument("--maps", type=int, default=50)
    parser.add_argument("--scale", type=float, default=0.75, help="what hints are multiplied by")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    requests = map_requests(options.maps)
    program = with_diffusers if options.with_diffusers else with_zimage_rt
    with program(options.controlnet, options.scale) as generate:
        images = {
            name: [generate(request, seed, controlled) for seed, request in enumerate(requests)]
            for name, controlled in (("with", True), ("without", False))
        }
    report = {
        "program": "diffusers" if options.with_diffusers else "zimage-rt",
        "maps": options.maps,
        "scale": options.scale,
        "overlap": OVERLAP,
        "machine": machine("numpy", *(("diffusers", "torch") if options.with_diffusers else ("onnxruntime",))),
        "scores": {name: scores(requests, found) for name, found in images.items()},
    }
    name = "control_places_diffusers" if options.with_diffusers else "control_places"
    write_results(name, report, to_markdown(report), options.out)
    if not options.with_diffusers:
        pictures = sheet(requests, list(images.values())).quantize(128, dither=Image.Dither.NONE)
        pictures.save(options.out / SHEET, optimize=True)
    print(to_markdown(report))


@contextmanager
def with_zimage_rt(controlnet: Path, scale: float) -> Iterator[Generate]:
    """The bundle that ships and the ControlNet, both in fp16, on the CPU."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        bundle, net = folder / "bundle", folder / "controlnet"
        shutil.copytree(demo_bundle(), bundle)
        add_programs(Bundle.open(bundle), ["cpu"], lora=True)
        export_controlnet(controlnet, net, ControlOptions(Precision.FP16), Progress(quiet=True))
        pipeline = stack.enter_context(Pipeline.from_bundle(bundle, executor="cpu"))

        def generate(request: Request, seed: int, control: bool) -> Pixels:
            given: dict[str, Any] = {}
            if control:
                given = {"control": Image.fromarray(request.edges), "controlnet": net, "control_scale": scale}
            result = pipeline.generate(request.prompt, size=request.size, steps=8, seed=seed, **given)
            return np.asarray(result.images[0])

        yield generate


@contextmanager
def with_diffusers(controlnet: Path, scale: float) -> Iterator[Generate]:
    """diffusers' two pipelines on one set of weights, in float32."""
    import torch
    from diffusers import ZImageControlNetModel, ZImageControlNetPipeline, ZImagePipeline

    torch.set_num_threads(1)  # faster at this size, where threads mostly wait for one another
    plain = ZImagePipeline.from_pretrained(DEMO, dtype=torch.float32)
    net = ZImageControlNetModel.from_pretrained(controlnet).float()
    net = ZImageControlNetModel.from_transformer(net, plain.transformer)
    controlled = ZImageControlNetPipeline(**plain.components, controlnet=net)
    for pipeline in (plain, controlled):
        pipeline.set_progress_bar_config(disable=True)

    def generate(request: Request, seed: int, control: bool) -> Pixels:
        width, height = request.size
        given: dict[str, Any] = {}
        if control:
            given = {"control_image": Image.fromarray(request.edges), "controlnet_conditioning_scale": scale}
        image = (controlled if control else plain)(
            request.prompt,
            width=width,
            height=height,
            num_inference_steps=8,
            guidance_scale=0,
            generator=torch.Generator().manual_seed(seed),
            **given,
        ).images[0]
        return np.asarray(image)

    yield generate


def scores(requests: Sequence[Request], images: Sequence[Pixels]) -> dict[str, Any]:
    """Shares between 0 and 1, over all maps and over those of one object and of two."""
    verdicts = [judge_landing(request, image) for request, image in zip(requests, images, strict=True)]
    by_count = {
        f"{count} object{'s' * (count > 1)}": [
            verdict for request, verdict in zip(requests, verdicts, strict=True) if len(request.scene.things) == count
        ]
        for count in (1, 2)
    }
    return {name: _shares(group) for name, group in {"all": verdicts, **by_count}.items() if group}


def _shares(verdicts: Sequence[Landing]) -> dict[str, float]:
    return {
        "maps": len(verdicts),
        "landed": statistics.mean(verdict.landed for verdict in verdicts),
        "landed_coloured": statistics.mean(verdict.landed_coloured for verdict in verdicts),
        "median_overlap": statistics.median(verdict.overlap for verdict in verdicts),
        "shapes": statistics.mean(verdict.shapes for verdict in verdicts),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The table, and where it comes from."""
    rows = [
        [
            f"{which} the ControlNet, {group}",
            one["maps"],
            f"{100 * one['landed']:.0f} %",
            f"{100 * one['landed_coloured']:.0f} %",
            f"{one['median_overlap']:.2f}",
            f"{100 * one['shapes']:.0f} %",
        ]
        for which, groups in report["scores"].items()
        for group, one in groups.items()
    ]
    diffusers = report["program"] == "diffusers"
    option, precision = (" --with-diffusers", "float32") if diffusers else ("", "fp16")
    shown = "" if diffusers else f"![Each map, its image with the ControlNet, and the image without]({SHEET})\n\n"
    header = ["images", "maps", "landed", "in its colour", "median overlap", "shapes and colours"]
    return (
        "# The demo model's ControlNet: where the map puts shapes, and where they land\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"Landed: for every object of the map, an area of one colour and the inside of its outline share at least "
        f"{report['overlap']} of what both cover; or an area of the colour that the prompt gives to it. The overlap is "
        "that of an image's worst object. Shapes and colours: what is seen is what the prompt asks for, nothing else. "
        "Prompts do not mention places. Each has a pair of colour and shape that training never showed.\n\n"
        f"{shown}"
        f"`PYTHONPATH=. python benchmarks/control_places.py{option} --maps {report['maps']} --scale "
        f"{report['scale']}`, {report['program']}, {precision}, 128x128, 8 steps; {describe(report['machine'])}\n"
    )


def sheet(requests: Sequence[Request], images: Sequence[Sequence[Pixels]]) -> Image.Image:
    """Each map above its images, in rows of ten."""
    width, height = requests[0].size
    layers = [[request.edges for request in requests], *images]
    rows = -(-len(requests) // COLUMNS)
    out = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (len(layers) * height + 3 * GAP) - 3 * GAP), "gray")
    for column, stack in enumerate(zip(*layers, strict=True)):
        x, y = column % COLUMNS * (width + GAP), column // COLUMNS * (len(layers) * height + 3 * GAP)
        for layer, pixels in enumerate(stack):
            out.paste(Image.fromarray(pixels), (x, y + layer * height))
    return out


if __name__ == "__main__":
    main()
