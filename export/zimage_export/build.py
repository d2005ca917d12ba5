"""Checkpoint → bundle, in a temporary folder beside the target that is renamed when it is complete."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.files import hash_file
from zimage_runtime.bundle.manifest import (
    Defaults,
    FileRecord,
    Manifest,
    Origin,
    Precision,
    ProgramRecord,
    write_manifest,
)
from zimage_runtime.bundle.rebalancing import PLACES
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import BundleError
from zimage_runtime.machine.gpu_targets import GpuTarget
from zimage_runtime.model.linears import LAYER_LINEARS
from zimage_runtime.model.programs import COMPONENTS, Program
from zimage_runtime.model.tokenizer import PromptTokenizer

from .engines.build import add_engines, check_engine_precision
from .errors import CheckpointError, ExportError
from .graphs import Graph, build_graphs, build_programs
from .graphs.program_file import file_name, write_program
from .measure.preview_map import fit_preview_map
from .measure.self_check import self_check
from .output import check_disk, check_target, replaced_directory
from .source.checkpoint import Checkpoint, OpenOptions
from .source.merging import read_loras, with_loras
from .source.model import find_model
from .source.single_files import NO_FILES, SingleFiles
from .source.variant import DEFAULTS, Variant
from .storage.carried import rotated_linears
from .storage.folds import Folds
from .storage.precision import StoragePolicy
from .storage.stored import StoredTensor, total_bytes
from .weights.folding import Peaks, blocks, check_fp16_range, choose_folds
from .weights.int4_layers import eight_bit_layers
from .weights.rebalance import Rebalancing, measured_ranges
from .weights.streaming import plan_embeddings, plan_weights, write_weights


@dataclass(frozen=True)
class BuildOptions:
    """What to build."""

    precision: Precision = Precision.FP32
    force: bool = False  # replace a bundle that is already there
    revision: str | None = None  # of a checkpoint on the Hub: a branch, tag or commit
    files: SingleFiles = NO_FILES  # components that come from a file of their own
    calibrate: Path | None = None  # prompts to measure activation ranges with
    engines: bool = False  # write TensorRT's block programs and engines, too
    gpus: tuple[GpuTarget, ...] = ()  # for which; none for the usual ones
    variant: Variant | None = None  # of the model, where its files do not say or contradict each other
    allow_pruned: bool = False  # fewer layers than published, at the published width
    loras: tuple[GivenLora, ...] = ()  # to merge into the weights, in this order
    lora_allow_unused: bool = False  # leave out tensors of theirs that belong to nothing in the model


class Phases:
    """How long each phase took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def end(self, phase: str) -> None:
        """Ends the phase that has been running since the last one ended."""
        now = time.perf_counter()
        self.seconds[phase] = round(now - self._start, 3)
        self._start = now


@dataclass(frozen=True)
class BuildReport:
    """A finished export."""

    bundle: Bundle
    seconds: dict[str, float]  # by phase: prepare (a download included), graphs, weights, programs, self_check, engines


def build(model: str | Path, out: str | Path, options: BuildOptions, progress: Progress) -> Bundle:
    """Like `build_reported`, without the report."""
    return build_reported(model, out, options, progress).bundle


def build_reported(model: str | Path, out: str | Path, options: BuildOptions, progress: Progress) -> BuildReport:
    """Exports a checkpoint, a directory or a name on the Hub, to a bundle at `out` and returns it opened.

    Raises `HubError` for a checkpoint that cannot be fetched, `CheckpointError` for a bad one, and `ExportError` for
    an output that already exists, a full disk or a failed self-check. In every case, `out` is either untouched or
    complete.
    """
    target, phases = Path(out), Phases()
    check_target(target, options.force)
    if options.engines:
        check_engine_precision(options.precision)
    checkpoint, options = _open(model, options, progress)
    checkpoint = _with_loras(checkpoint, options, progress)
    _check_tokenizer(checkpoint)
    peaks = _measured(checkpoint, options, progress)
    folds = choose_folds(checkpoint, peaks)
    if peaks is not None and options.precision is Precision.FP16:
        check_fp16_range(peaks, folds)
    policy = StoragePolicy(
        options.precision,
        checkpoint.vae_type,
        checkpoint.timestep_type,
        calibrated=peaks is not None,
        rotations=_rotations(checkpoint, options),
    )
    balance = _balance(checkpoint, options.precision, peaks, policy)
    if options.precision is Precision.INT4:
        plan_weights(checkpoint, build_graphs(checkpoint.config), StoragePolicy(Precision.FP32), {})  # checks shapes
        policy = dataclasses.replace(policy, eight_bits=eight_bit_layers(checkpoint, balance))
    phases.end("prepare")
    graphs = build_programs(checkpoint.config, policy, folds)
    phases.end("graphs")
    weights = plan_weights(checkpoint, graphs, policy, folds, balance if policy.rebalanced else None, peaks)
    embeddings = plan_embeddings(checkpoint, policy)
    streams = {f"{component}/weights.safetensors": tensors for component, tensors in weights.items()}
    streams["text_encoder/embeddings.safetensors"] = embeddings
    if policy.rebalanced:  # a LoRA needs them; they are chosen with the weights, so written after them
        names = blocks(checkpoint.config)
        streams |= {_rebalancing_file(component): balance.stored(component, names[component]) for component in PLACES}
    needed = sum(total_bytes(tensors) for tensors in streams.values())
    check_disk(target, needed)
    progress.note(
        f"exporting {checkpoint.name} as {options.precision}: {needed / 1e9:.2f} GB will be written to {target}"
    )
    with replaced_directory(target) as folder:
        manifest = _write(folder, checkpoint, graphs, streams, options, progress, phases)
        manifest = dataclasses.replace(manifest, rotations=policy.rotations)
        checked, colours = self_check(Bundle(folder, manifest)), fit_preview_map(Bundle(folder, manifest))
        manifest = dataclasses.replace(manifest, self_check=checked, folds=_plain(folds), preview=colours)
        manifest = _with_earlier(target, manifest)
        write_manifest(folder, manifest)
        phases.end("self_check")
        if options.engines:
            add_engines(Bundle(folder, manifest), options.gpus, progress)
            phases.end("engines")
    return BuildReport(Bundle.open(target), phases.seconds)


def _with_earlier(target: Path, manifest: Manifest) -> Manifest:
    """The manifest, which images of the bundle that it replaces still match if the weights are the same."""
    try:
        replaced = Bundle.open(target).manifest
    except BundleError:
        return manifest
    if replaced.fingerprint != manifest.fingerprint:
        return manifest
    earlier = dict.fromkeys((*replaced.earlier_fingerprints, replaced.files_fingerprint))
    earlier.pop(manifest.files_fingerprint, None)
    return dataclasses.replace(manifest, earlier_fingerprints=tuple(earlier))


def _open(model: str | Path, options: BuildOptions, progress: Progress) -> tuple[Checkpoint, BuildOptions]:
    """Opens the checkpoint, fetched if it is on the Hub; the returned options contain the commit that was fetched."""
    found = find_model(model, progress, options.revision, options.files)
    options = dataclasses.replace(options, files=found.files)
    checkpoint = Checkpoint.open(found.path, found.files, OpenOptions(options.variant, options.allow_pruned))
    if checkpoint.variant.note:
        progress.note(checkpoint.variant.note)
    if found.name is None:
        return checkpoint, options
    if options.files.transformer:  # the file that the bundle is named after is not on the Hub
        return checkpoint, dataclasses.replace(options, revision=None)
    return dataclasses.replace(checkpoint, name=found.name), dataclasses.replace(options, revision=found.revision)


def _with_loras(checkpoint: Checkpoint, options: BuildOptions, progress: Progress) -> Checkpoint:
    if not options.loras:
        return checkpoint
    loras = read_loras(options.loras, checkpoint.config, allow_unused=options.lora_allow_unused, progress=progress)
    for lora in loras:
        for name in lora.adapter.unused:
            progress.warn(f"{lora.adapter.path}: {name} is left out: it belongs to nothing in the model")
    return with_loras(checkpoint, loras)


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    graphs: list[Graph],
    streams: dict[str, list[StoredTensor]],
    options: BuildOptions,
    progress: Progress,
    phases: Phases,
) -> Manifest:
    files: dict[str, FileRecord] = {}
    with progress.task("weights", sum(total_bytes(t) for t in streams.values()), in_bytes=True) as advance:
        for name, tensors in streams.items():
            (folder / name).parent.mkdir(exist_ok=True)
            files[name] = write_weights(folder / name, tensors, advance)
    phases.end("weights")
    programs: dict[Program, dict[str, ProgramRecord]] = {}
    for graph in graphs:
        component = graph.program.component
        weights = folder / component / "weights.safetensors"
        record, file = write_program(folder, f"{component}/{file_name(graph)}", graph, weights)
        programs.setdefault(graph.program, {})[graph.executor] = record
        files[record.path] = file
    shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
    tokenizer = folder / "tokenizer.json"
    files[tokenizer.name] = FileRecord(tokenizer.stat().st_size, hash_file(tokenizer))
    phases.end("programs")
    side, defaults = checkpoint.config.vae.sample_size, DEFAULTS[checkpoint.variant.variant]
    return Manifest(
        precision=options.precision,
        source=Origin(checkpoint.name, options.revision),
        exporter=f"zimage-export {version('zimage-rt')}",
        config=checkpoint.config,
        defaults=Defaults(side, side, defaults.steps, defaults.cfg_scale),
        variant=checkpoint.variant.variant.value,
        programs=programs,
        weights={component: f"{component}/weights.safetensors" for component in COMPONENTS},
        embeddings="text_encoder/embeddings.safetensors",
        tokenizer="tokenizer.json",
        files=files,
        rebalancing={component: path for component in COMPONENTS if (path := _rebalancing_file(component)) in files},
    )


def _rebalancing_file(component: str) -> str:
    return f"{component}/rebalancing.safetensors"


def _measured(checkpoint: Checkpoint, options: BuildOptions, progress: Progress) -> Peaks | None:
    """The activations of the prompts to calibrate with. Base in fp16 is always measured: its activations are larger."""
    measured = checkpoint.variant.variant is Variant.BASE and options.precision is Precision.FP16
    if options.calibrate is None and not measured:
        return None
    from .measure.calibrate import PROMPTS, measure_peaks, read_prompts

    prompts = list(PROMPTS) if options.calibrate is None else read_prompts(options.calibrate)
    return measure_peaks(checkpoint, prompts, progress, moments=options.precision is Precision.INT4)


def _balance(checkpoint: Checkpoint, precision: Precision, peaks: Peaks | None, policy: StoragePolicy) -> Rebalancing:
    """The rebalancing of a precision. int4's goes by the weights alone: by measured ranges, which a few tokens with
    very large values decide, images of the demo model were farther from float32's (see docs/integers.md)."""
    if precision is Precision.INT4:
        return Rebalancing(checkpoint, only_far=True)
    return Rebalancing(checkpoint, measured_ranges(peaks), policy.rotations)


def _rotations(checkpoint: Checkpoint, options: BuildOptions) -> dict[str, int]:
    """The rotated int8 weights that an int8 bundle carries as they are. Raises `ExportError` where engines cannot."""
    if options.precision is not Precision.INT8:
        return {}
    found: dict[str, int] = {}
    for component, names in LAYER_LINEARS.items():
        linears = [f"{block}.{name}.weight" for block in blocks(checkpoint.config)[component] for name in names]
        found |= rotated_linears(component, linears, checkpoint.weights(component))
    if found and options.engines:
        check_engine_rotations(found)
    return found


def check_engine_rotations(rotations: Mapping[str, int]) -> None:
    """Raises `ExportError` for a bundle whose int8 weights are rotated, which block programs do not know of."""
    if rotations:
        raise ExportError(
            f"TensorRT's block programs do not support rotated int8 weights (ConvRot, {len(rotations)} of them); use a "
            f"bf16 or fp16 bundle, or an int8 bundle of the unquantized checkpoint"
        )


def _plain(folds: dict[str, Folds]) -> dict[str, dict[str, dict[str, int]]]:
    return {component: {block: vars(fold) for block, fold in by_block.items()} for component, by_block in folds.items()}


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    size = PromptTokenizer(checkpoint.tokenizer).vocab_size
    rows = checkpoint.config.text_encoder.vocab_size
    if size > rows:
        raise CheckpointError(f"{checkpoint.tokenizer}: has {size} tokens, the text encoder only {rows} embeddings")
