"""`zimage-rt run`: a prompt goes in, paths of images come out."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.command_line.console import SizeType, VariationType
from zimage_runtime.command_line.option_groups import GroupedCommand
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import RequestError
from zimage_runtime.model.control_type import ControlType
from zimage_runtime.model.sampling_names import SamplerName, SchedulerName

from .execution_options import execution_options
from .run_options import GROUPS, RunOptions

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_runtime.images.metadata import ImageInfo
    from zimage_runtime.pipeline import Event, Job, Pipeline

CONTROL_TYPES = [kind.value for kind in ControlType]
SAMPLERS, SCHEDULERS = ([name.value for name in names] for names in (SamplerName, SchedulerName))


@click.command(cls=GroupedCommand, groups=GROUPS, short_help="Generate images from a prompt.")
@click.argument("prompt", required=False)
@click.option(
    "-m", "--model", type=click.Path(), help="The bundle to generate with: a directory, or its Hub id, ORG/NAME."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="PNG, JPEG or WebP file.  [default: zimage-SEED.png]"
)
@click.option("--size", type=SizeType(), help="Multiples of 16.  [default: the bundle's own]")
@click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's own, 8 for Turbo]")
@click.option("--seed", type=int, help="The same seed generates the same image.  [default: random]")
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Images, with seeds SEED, SEED+1, …",
)
@click.option(
    "--replay",
    type=click.Path(path_type=Path),
    help="Generate the image in this file again: prompt, size, steps and seed come from its metadata.",
)
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    help="A source image, resized to --size.  [default size: its own, cut to multiples of 16]",
)
@click.option("--strength", type=float, help="How far from the source image, 0 to 1.  [default: 0.6; with --mask 1]")
@click.option("--mask", type=click.Path(path_type=Path), help="White areas of this image are repainted.")
@click.option(
    "--mask-grow", type=click.IntRange(0), default=0, help="Widen the mask's white areas by this many pixels."
)
@click.option("--negative", help="What to guide the image away from.  [needs --cfg-scale]")
@click.option(
    "--cfg-scale",
    type=float,
    help="Guidance, as in A1111 and ComfyUI: 1 is none, more takes two forwards a step.  [default: the bundle's own]",
)
@click.option("--cfg-normalization", is_flag=True, help="Guidance makes no velocity longer than it was.")
@click.option("--cfg-truncation", type=float, help="Guide up to this share of the schedule only.  [default: 1, all]")
@click.option(
    "--lora",
    multiple=True,
    metavar="FILE[:WEIGHT]",
    help="A LoRA, times WEIGHT of any sign; may be given again.  [default weight: 1]",
)
@click.option("--lora-allow-unused", is_flag=True, help="Leave out what of a LoRA belongs to nothing in the model.")
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    help="What a ControlNet reads: edges, depth, a pose, …  [default size: its own, cut to multiples of 16]",
)
@click.option(
    "--controlnet", type=click.Path(path_type=Path), help="Its folder, which `zimage-export controlnet` makes."
)
@click.option("--control-type", type=click.Choice(CONTROL_TYPES), help="Make this of a photograph first.")
@click.option("--control-scale", type=float, help="How much control there is; 0 is none.  [default: 0.75]")
@click.option("--control-start", type=float, help="Share of the steps before which there is none.  [default: 0]")
@click.option("--control-end", type=float, help="Share of the steps after which there is none.  [default: 1]")
@click.option("--sampler", type=click.Choice(SAMPLERS), help="How steps are taken.  [default: euler]")
@click.option(
    "--scheduler",
    type=click.Choice(SCHEDULERS),
    help="How sigmas are chosen.  [default: model]",
)
@click.option("--shift", type=float, help="Of the schedule: more gives the noise more steps.  [default: the model's]")
@click.option(
    "--variation",
    type=VariationType(),
    help="Mix another seed's noise into the seed's, like 5:0.2; with -n, of SEED, SEED+1, …",
)
@execution_options
@click.option(
    "--preview",
    type=click.Path(path_type=Path),
    help="Rewrite this small PNG, JPEG or WebP file after each step: what the image will be, roughly.",
)
@click.option("--no-metadata", is_flag=True, help="Write nothing but pixels.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the paths.")
@click.option("--quiet", is_flag=True, help="No progress on stderr; warnings remain.")
def run(**given: Any) -> None:
    """Generate images of PROMPT and print the path of each file written."""
    from zimage_runtime.bundle.hub import adapter_file, bundle_directory
    from zimage_runtime.events import NO_PREVIEWS
    from zimage_runtime.images.outputs import check_output
    from zimage_runtime.pipeline import Pipeline

    from ..demo import demo_bundle

    options = RunOptions(**given)
    options.check()
    start = time.perf_counter()
    progress = Progress(options.quiet)
    check_output(options.output)
    if options.preview is not None:
        check_output(options.preview)
    recorded = _recorded(options.replay) if options.replay else None
    if recorded:
        options.check_sources(recorded)
    for lora in options.given_loras():
        adapter_file(lora.file, progress)  # fetched here, where progress is shown
    request = options.request(recorded)
    bundle = bundle_directory(options.model, progress) if options.model is not None else demo_bundle()
    with Pipeline.from_bundle(
        bundle,
        options.executor,
        options.vram,
        device=options.device,
        low_memory=options.low_memory,
        keep_loaded=False,
        trust_engines=options.trust_engines,
        note=progress.note,
    ) as pipeline:
        if recorded and options.replay:
            _check_same_bundle(recorded, pipeline, options.replay)
        if options.preview is not None and pipeline.bundle.manifest.preview is None:
            raise RequestError(f"--preview: {NO_PREVIEWS}")
        job = pipeline.prepare(request)
        if recorded:
            _compare(recorded, job, options, progress)
        if job.choice is not None and not any(notice.text == job.choice for notice in job.notices):
            progress.note(job.choice)
        report = _Report(options.as_json)
        writer = _Writer(options.output, not options.no_metadata, len(job.seeds), report)
        writer.check(job.info)
        _generate(pipeline.run(job), job, writer, options.preview, progress)
    report.finish(time.perf_counter() - start)


def _recorded(replay: Path) -> "ImageInfo":
    from zimage_runtime.images.image_files import read_image_info

    return read_image_info(replay)


def _check_same_bundle(recorded: "ImageInfo", pipeline: "Pipeline", replay: Path) -> None:
    """Another bundle would generate another image, which is not what a replay promises."""
    manifest = pipeline.bundle.manifest
    if not manifest.matches(recorded.fingerprint):
        raise RequestError(
            f"{replay}: was generated with another bundle, {recorded.model} ({recorded.fingerprint[:12]}); "
            f"this one is {manifest.name} ({manifest.fingerprint[:12]}): give that bundle with -m"
        )


def _compare(recorded: "ImageInfo", job: "Job", options: RunOptions, progress: Progress) -> None:
    """Refuses other sources, and says what else may make the image another one."""
    from zimage_runtime.images.metadata import differences

    pairs = (
        (options.image, recorded.image, job.info.image),
        (options.mask, recorded.mask, job.info.mask),
        (options.control, recorded.control, job.info.control),
    )
    for given, wanted, found in pairs:
        if wanted != found:
            raise RequestError(f"{given}: is not the image that {options.replay} was generated from; its pixels differ")
    options.check_loras(recorded, job.info)
    if recorded.controlnet_hash != job.info.controlnet_hash:
        raise RequestError(
            f"{options.controlnet}: is {job.info.controlnet}, and {options.replay} was generated with "
            f"{recorded.controlnet} ({(recorded.controlnet_hash or '')[:12]})"
        )
    for line in differences(recorded, job.info):
        progress.warn(line)


@dataclass
class _Report:
    """What is said on stdout: a path as each image is written, or one document at the end."""

    as_json: bool
    images: list[dict[str, Any]] = field(default_factory=list)

    def image(self, path: Path, seed: int) -> None:
        self.images.append({"path": str(path), "seed": seed})
        if not self.as_json:
            click.echo(str(path))

    def finish(self, seconds: float) -> None:
        if self.as_json:
            document = {"images": self.images, "seconds": round(seconds, 3)}
            click.echo(json.dumps(document, indent=2))  # ASCII, so that any path can be printed


@dataclass(frozen=True)
class _Writer:
    """Encodes and writes images, each with its own seed in its metadata."""

    output: Path | None
    metadata: bool
    count: int
    report: _Report

    def check(self, info: "ImageInfo") -> None:
        """Fails now where writing would fail later for a reason that is known now."""
        from dataclasses import replace

        from PIL import Image

        from zimage_runtime.model.noise import MAX_SEED

        self._encode(Image.new("RGB", (1, 1)), replace(info, seed=MAX_SEED))  # whose metadata is the longest

    def write(self, image: "Image", info: "ImageInfo") -> None:
        from zimage_runtime.images.outputs import write_image

        path = write_image(self._encode(image, info), self.output, info.seed, self.count)
        self.report.image(path, info.seed)

    def _encode(self, image: "Image", info: "ImageInfo") -> bytes:
        from zimage_runtime.images.formats import ImageFormat, image_format
        from zimage_runtime.images.image_files import encode_image

        kind = image_format(self.output) if self.output else ImageFormat.PNG
        return encode_image(image, kind, info if self.metadata else None)


def _generate(events: "Iterator[Event]", job: "Job", writer: _Writer, preview: Path | None, progress: Progress) -> None:
    """Writes each image as soon as it is decoded, so that an interrupt loses only what is at work."""
    from zimage_runtime.images.preview import write_preview
    from zimage_runtime.pipeline import CaptionEvent, ImageEvent, NoticeEvent, StepEvent

    with progress.task("generating", job.steps * len(job.seeds)) as advance:
        for event in events:
            match event:
                case NoticeEvent():
                    (progress.warn if event.warning else progress.note)(event.text)
                case CaptionEvent():
                    for name, cut in (("prompt", event.cut_tokens), ("negative prompt", event.negative_cut_tokens)):
                        if cut:
                            progress.warn(f"the {name} is too long: its last {cut} tokens were cut off")
                case StepEvent():
                    advance(len(event.seeds))
                    if preview is not None:
                        write_preview(event.preview(), preview)
                case ImageEvent():
                    with progress.aside():
                        writer.write(event.image, event.info)
