"""`zimage-rt run`: a prompt goes in, paths of images come out."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.command_line.console import MemoryType, SizeType
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import RequestError
from zimage_runtime.executors.registry import AUTO, EXECUTORS

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_runtime.images.metadata import ImageInfo
    from zimage_runtime.pipeline import Event, Job, Pipeline


@click.command(short_help="Generate images from a prompt.")
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
@click.option("--executor", type=click.Choice([AUTO, *EXECUTORS]), default=AUTO, show_default=True)
@click.option(
    "--device", type=click.IntRange(0), default=0, show_default=True, help="Which GPU, where there are several."
)
@click.option("--vram", type=MemoryType(), help="GPU memory to use at most, like 8GiB.  [default: what is free]")
@click.option("--low-memory", is_flag=True, help="Keep weights on disk, mapped: slower, far less memory.")
@click.option("--no-metadata", is_flag=True, help="Write nothing but pixels.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the paths.")
@click.option("--quiet", is_flag=True, help="No progress on stderr; warnings remain.")
def run(
    prompt: str | None,
    model: str | None,
    output: Path | None,
    size: tuple[int, int] | None,
    steps: int | None,
    seed: int | None,
    count: int,
    replay: Path | None,
    image: Path | None,
    strength: float | None,
    mask: Path | None,
    mask_grow: int,
    executor: str,
    device: int,
    vram: int | None,
    low_memory: bool,
    no_metadata: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Generate images of PROMPT and print the path of each file written."""
    from zimage_runtime.bundle.hub import bundle_directory
    from zimage_runtime.images.outputs import check_output
    from zimage_runtime.pipeline import Pipeline, Request

    from ..demo import demo_bundle

    if (prompt is None) == (replay is None):
        raise click.UsageError("give a PROMPT, or --replay FILE, and not both")
    if replay and ((size, steps, seed) != (None, None, None) or count != 1):
        raise click.UsageError("--replay takes size, steps and seed from the file; leave these options out")
    if replay and (strength is not None or mask_grow):
        raise click.UsageError("--replay takes --strength and --mask-grow from the file; leave these options out")
    if image is None and not replay and (strength is not None or mask is not None):
        raise click.UsageError("--strength and --mask need a source image: give it with --image")
    if mask is None and mask_grow:
        raise click.UsageError("--mask-grow widens a mask: give one with --mask")
    start = time.perf_counter()
    check_output(output)
    recorded = _recorded(replay) if replay else None
    if recorded and replay:
        _check_sources_given(recorded, image, mask, replay)
        prompt, size = recorded.prompt, (recorded.width, recorded.height)
        steps, seed, strength, mask_grow = recorded.steps, recorded.seed, recorded.strength, recorded.mask_grow
    request = Request(
        prompt or "",
        size=size,
        steps=steps,
        seed=seed,
        count=count,
        image=image,
        strength=strength,
        mask=mask,
        mask_grow=mask_grow,
    )
    progress = Progress(quiet)
    bundle = bundle_directory(model, progress) if model is not None else demo_bundle()
    with Pipeline.from_bundle(
        bundle, executor, vram, device=device, low_memory=low_memory, keep_loaded=False, note=progress.note
    ) as pipeline:
        if recorded and replay:
            _check_same_bundle(recorded, pipeline, replay)
        job = pipeline.prepare(request)
        if recorded and replay:
            _compare(recorded, job, image, mask, replay, progress)
        if job.choice is not None and not any(notice.text == job.choice for notice in job.notices):
            progress.note(job.choice)
        report = _Report(as_json)
        writer = _Writer(output, not no_metadata, len(job.seeds), report)
        writer.check(job.info)
        _generate(pipeline.run(job), job, writer, progress)
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


def _check_sources_given(recorded: "ImageInfo", image: Path | None, mask: Path | None, replay: Path) -> None:
    """An image file holds only the hashes of the images that it was generated from."""
    for option, given, wanted in (("--image", image, recorded.image), ("--mask", mask, recorded.mask)):
        if wanted and given is None:
            raise RequestError(
                f"{replay}: was generated from another image, which is needed again; give it with {option}"
            )
        if given is not None and not wanted:
            raise RequestError(f"{replay}: was generated without {option}; leave it out")


def _compare(
    recorded: "ImageInfo", job: "Job", image: Path | None, mask: Path | None, replay: Path, progress: Progress
) -> None:
    """Refuses other sources, and says what else may make the image another one."""
    from zimage_runtime.images.metadata import differences

    for given, wanted, found in ((image, recorded.image, job.info.image), (mask, recorded.mask, job.info.mask)):
        if wanted != found:
            raise RequestError(f"{given}: is not the image that {replay} was generated from; its pixels differ")
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


def _generate(events: "Iterator[Event]", job: "Job", writer: _Writer, progress: Progress) -> None:
    """Writes each image as soon as it is decoded, so that an interrupt loses only what is at work."""
    from zimage_runtime.pipeline import CaptionEvent, ImageEvent, NoticeEvent, StepEvent

    with progress.task("generating", job.steps * len(job.seeds)) as advance:
        for event in events:
            match event:
                case NoticeEvent():
                    (progress.warn if event.warning else progress.note)(event.text)
                case CaptionEvent(cut_tokens=cut) if cut:
                    progress.warn(f"the prompt is too long: its last {cut} tokens were cut off")
                case StepEvent():
                    advance(len(event.seeds))
                case ImageEvent():
                    with progress.aside():
                        writer.write(event.image, event.info)
