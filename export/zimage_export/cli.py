"""The `zimage-export` command."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.console import LayersType, SizeType, run_command
from zimage_runtime.command_line.progress import Progress

from .errors import require_extra, require_onnx

if TYPE_CHECKING:
    from zimage_runtime.adapters.given import GivenLora
    from zimage_runtime.bundle.bundle import Bundle

    from .measure.verify import VerifyReport
    from .source.single_files import SingleFiles

_FILE = click.Path(path_type=Path)
_VARIANTS = ("turbo", "base")
_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "portable")
_EXECUTORS = ("cpu", "cuda", "webgpu")  # TensorRT's programs come with their engines
_gpu_option = click.option(
    "--gpu",
    "gpus",
    type=click.Choice(_GPUS),
    multiple=True,
    help="GPU generation to build engines for; may be given again.  [default: portable and sm75]",
)


def _single_files(command: Callable[..., None]) -> Callable[..., None]:
    """Options for components from single files."""
    say = "The published tokenizer.json, where neither MODEL nor this machine's caches have it."
    command = click.option("--tokenizer", type=_FILE, help=say)(command)
    for part, example in (("vae", ""), ("text-encoder", ""), ("transformer", ", such as a fine-tune")):
        say = f"A safetensors or GGUF file, or ORG/NAME/FILE on the Hub, in place of the checkpoint's{example}."
        command = click.option(f"--{part}", type=_FILE, help=say)(command)
    return command


def _lora_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="FILE[:WEIGHT]",
        help="A LoRA to merge into the weights, times WEIGHT; may be given again.  [default weight: 1]",
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="zimage-rt", prog_name="zimage-export")
def cli() -> None:
    """Export a Z-Image checkpoint to a bundle that zimage-rt generates from."""


@cli.command(short_help="Export a checkpoint to a bundle.")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice([p.value for p in Precision]),
    default=Precision.FP32.value,
    show_default=True,
    help="How weights are stored and computed with.",
)
@click.option("--revision", help="Branch, tag or commit of MODEL on the Hub.  [default: main]")
@_single_files
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="Text file of prompts, one per line, for measuring the activations of int8 and int4, and the range of fp16.  "
    "[default: from the weights alone]",
)
@click.option(
    "--variant",
    type=click.Choice(_VARIANTS),
    help="Which model the weights are.  [default: from the scheduler, the file's metadata and its name]",
)
@click.option("--allow-pruned", is_flag=True, help="Build a file that has fewer layers than the published model.")
@_lora_option
@click.option(
    "--lora-allow-unused", is_flag=True, help="Leave out what of a LoRA belongs to nothing in the model, and list it."
)
@click.option("--engines", is_flag=True, help="Also write TensorRT block programs and engines, as `engines` does.")
@_gpu_option
@click.option(
    "--verify",
    "measure",
    is_flag=True,
    help="Then measure the bundle against MODEL, as `verify` does.",
)
@click.option("--force", is_flag=True, help="Replace the bundle at OUT, if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the path.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def build(
    model: str,
    out: Path,
    precision: str,
    revision: str | None,
    transformer: Path | None,
    text_encoder: Path | None,
    vae: Path | None,
    tokenizer: Path | None,
    calibrate: Path | None,
    variant: str | None,
    allow_pruned: bool,
    loras: tuple[str, ...],
    lora_allow_unused: bool,
    engines: bool,
    gpus: tuple[str, ...],
    measure: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export the checkpoint MODEL to a bundle at OUT.

    MODEL is a directory in diffusers layout, a name on the Hub such as Tongyi-MAI/Z-Image-Turbo, one file that contains
    every component, a ComfyUI models folder, or "tiny", the demo model of the repository.
    """
    require_extra()
    if gpus and not engines:
        raise click.UsageError("--gpu requires --engines")
    from zimage_runtime.adapters.given import GivenLora
    from zimage_runtime.machine.gpu_targets import GpuTarget

    from .build import BuildOptions, build_reported
    from .source.single_files import SingleFiles
    from .source.variant import known_variant

    files = SingleFiles(transformer, text_encoder, vae, tokenizer)
    progress, given = Progress(quiet), tuple(map(GivenLora.parse, loras))
    options = BuildOptions(
        Precision(precision),
        force,
        revision,
        files=files,
        calibrate=calibrate,
        engines=engines,
        gpus=tuple(map(GpuTarget, gpus)),
        variant=known_variant(variant),
        allow_pruned=allow_pruned,
        loras=given,
        lora_allow_unused=lora_allow_unused,
    )
    report = build_reported(model, out, options, progress)
    bundle = report.bundle
    if measure:
        bundle = _verify(bundle, model, progress, None, files, revision, loras=given).bundle
    manifest = bundle.manifest
    _report(
        {
            "path": str(out),
            "precision": manifest.precision.value,
            "bytes": bundle.size,
            "seconds": report.seconds,
            "fingerprint": manifest.fingerprint,
            "self_check": dict(manifest.self_check),
            "parity": manifest.parity,
        },
        as_json,
        str(out),
    )


@cli.command(short_help="Add TensorRT engines to a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@_gpu_option
@click.option("--lora", is_flag=True, help="Also those that take LoRA at run time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the path.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def engines(bundle: Path, gpus: tuple[str, ...], lora: bool, as_json: bool, quiet: bool) -> None:
    """Add TensorRT block programs and engines to BUNDLE, or replace them.

    No GPU is needed. Engines contain no weights. An engine that does not suit a GPU or a version of TensorRT is rebuilt
    there, in seconds.
    """
    require_extra()
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.manifest import ENGINES_FOLDER
    from zimage_runtime.executors.tensorrt.engine_store import read_catalog
    from zimage_runtime.machine.gpu_targets import GpuTarget

    from .build import check_engine_rotations
    from .engines.build import add_engines

    opened = Bundle.open(bundle)
    check_engine_rotations(opened.manifest.rotations)
    renewed = add_engines(opened, tuple(map(GpuTarget, gpus)), Progress(quiet), lora=lora)
    files = {path: record.size for path, record in renewed.manifest.files.items() if path.startswith(ENGINES_FOLDER)}
    built = [vars(engine) for engine in read_catalog(renewed).engines]
    _report({"path": str(bundle), "bytes": sum(files.values()), "engines": built}, as_json, str(bundle))


@cli.command(short_help="Add the programs that a bundle lacks.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--executor",
    "executors",
    type=click.Choice(_EXECUTORS),
    multiple=True,
    help="Executor to add programs for; may be given again.  [default: all that the bundle's precision is for]",
)
@click.option(
    "--lora",
    "--control",
    "extended",
    is_flag=True,
    help="Also add those that take LoRA and a ControlNet, which `zimage-rt run` needs for either.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the path.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def programs(bundle: Path, executors: tuple[str, ...], extended: bool, as_json: bool, quiet: bool) -> None:
    """Add the programs that BUNDLE lacks, such as those of an executor that is newer than the bundle.

    Programs whose files are missing or damaged are written again. One takes 2 MB at most. Weights are neither needed in
    memory nor rewritten, and images that the bundle has generated still match it. Of the export extra, only onnx is
    used.
    """
    require_onnx()
    from zimage_runtime.bundle.bundle import Bundle

    from .programs import add_programs

    progress = Progress(quiet)
    report = add_programs(Bundle.open(bundle, repairs_programs=True), executors, progress, lora=extended)
    manifest = report.bundle.manifest
    added = [
        {"program": program.value, "name": name, "path": record.path, "bytes": manifest.files[record.path].size}
        for program, name, record in report.added
    ]
    if not added:
        progress.note(f"{bundle} already has every program")
    document = {"path": str(bundle), "added": added, "executors": sorted(manifest.executors)}
    _report({**document, "fingerprint": manifest.fingerprint}, as_json, str(bundle))


@cli.command(short_help="Export a ControlNet.")
@click.argument("file", type=_FILE)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice([p.value for p in Precision]),
    default=Precision.FP32.value,
    show_default=True,
    help="How weights are stored and computed with; it need not be the bundle's.",
)
@click.option(
    "--places",
    type=LayersType(),
    help="The model's layers after which hints are added, like 0,2,4.  [default: from the file and its size]",
)
@click.option("--verify", "measure", is_flag=True, help="Then measure its programs against FILE.")
@click.option("--force", is_flag=True, help="Replace the ControlNet at OUT, if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the path.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def controlnet(
    file: Path,
    out: Path,
    precision: str,
    places: tuple[int, ...] | None,
    measure: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export the ControlNet in FILE to a folder at OUT, which `zimage-rt run --controlnet OUT` takes.

    FILE is one of the published Fun Controlnet Union or Tile files (versions 1.0 to 2.1, lite), or a folder that
    diffusers saved. The bundle that it is used with is not needed.
    """
    require_extra()
    from .controlnet import ControlOptions, export_controlnet

    options = ControlOptions(Precision(precision), places, measure, force)
    opened = export_controlnet(file, out, options, Progress(quiet))
    manifest = opened.manifest
    _report(
        {
            "path": str(out),
            "version": manifest.config.version,
            "precision": manifest.precision.value,
            "bytes": sum(record.size for record in manifest.files.values()),
            "fingerprint": manifest.fingerprint,
            "self_check": dict(manifest.self_check),
            "parity": manifest.parity,
        },
        as_json,
        str(out),
    )


@cli.command(short_help="Measure a bundle against its checkpoint.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", required=True, help="The checkpoint that the bundle was made from, as for build.")
@_single_files
@_lora_option
@click.option("--size", type=SizeType(), help="Size of the images.  [default: the bundle's own, at most 256x256]")
@click.option("--prompts", type=_FILE, help="Text file of prompts, one per line, each generated once.  [default: two]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def verify(
    bundle: Path,
    reference: str,
    transformer: Path | None,
    text_encoder: Path | None,
    vae: Path | None,
    tokenizer: Path | None,
    loras: tuple[str, ...],
    size: tuple[int, int] | None,
    prompts: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure BUNDLE against its checkpoint in float32 and write the result to its manifest.

    Each component is compared on its own, then the final latents and the image. The reference is diffusers, run a block
    at a time, so that even the largest checkpoint fits into memory. Fails if the bundle is further from the checkpoint
    than its precision allows. Also prints what each precision would cost each layer, and writes a summary of it.
    """
    from zimage_runtime.adapters.given import GivenLora
    from zimage_runtime.bundle.bundle import Bundle

    from .measure.parity import parity_table
    from .measure.sensitivity import table
    from .source.single_files import SingleFiles

    files = SingleFiles(transformer, text_encoder, vae, tokenizer)
    given = tuple(map(GivenLora.parse, loras))
    measured = _verify(Bundle.open(bundle), reference, Progress(quiet), size, files, prompts=prompts, loras=given)
    parity = dict(measured.bundle.manifest.parity or {})
    document = {**parity, "each_layer": measured.layers}
    _report(document, as_json, f"{parity_table(parity)}\n{table(measured.layers)}")


def _verify(
    bundle: "Bundle",
    reference: str,
    progress: Progress,
    size: tuple[int, int] | None,
    files: "SingleFiles",
    revision: str | None = None,
    prompts: Path | None = None,
    loras: tuple["GivenLora", ...] = (),
) -> "VerifyReport":
    require_extra()
    from zimage_runtime.bundle.hub import hub_id

    from .measure.calibrate import read_prompts
    from .measure.verify import PROMPTS, verify_reported
    from .source.model import find_model

    generated = PROMPTS if prompts is None else read_prompts(prompts)
    source = bundle.manifest.source
    if hub_id(reference) == source.name.partition("+")[0]:  # what follows names LoRA
        revision = source.revision  # what the bundle was made from
    found = find_model(reference, progress, revision, files)
    return verify_reported(bundle, found.path, progress, size, found.files, generated, loras)


@cli.command(short_help="Write a checkpoint of random weights.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scale", type=click.Choice(["small", "full"]), default="small", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random weights.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A tokenizer.json to use instead of the small byte-level one.",
)
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def synthesize(out: Path, scale: str, seed: int, tokenizer: Path | None, quiet: bool) -> None:
    """Write a checkpoint of random weights to OUT, in the published layout, for trying out the tools.

    A small one takes 6 MB. A full one has the published shapes and types, and takes 33 GB.
    """
    require_extra()
    from .synthetic.checkpoint import SCALES, write_checkpoint

    write_checkpoint(out, SCALES[scale], seed=seed, tokenizer=tokenizer, progress=Progress(quiet))
    click.echo(str(out))


def _report(document: dict[str, Any], as_json: bool, line: str) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False) if as_json else line)


def main() -> None:
    """The console script."""
    sys.exit(run_command(cli))
