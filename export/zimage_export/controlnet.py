"""A ControlNet's file → its folder, with programs for every executor; all or nothing, as a bundle is built.

Its blocks are like the transformer's, and are folded, rebalanced and rounded in the same ways.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from zimage_runtime.bundle.controlnet import ControlManifest, ControlNet, write_control_manifest
from zimage_runtime.bundle.manifest import FileRecord, Origin, Precision, ProgramRecord
from zimage_runtime.bundle.rebalancing import SharedHeads
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.control import COMPONENT
from zimage_runtime.model.programs import Program

from .graphs import PROGRAM_SETS, Graph, Target
from .graphs.controlnet import CONTROL_SETS, ControlGraphs, control_programs
from .graphs.program_file import file_name, write_program
from .measure.control_check import check_control
from .output import check_disk, check_target, replaced_directory
from .source.control_file import ControlFile, open_control_file
from .source.weights import Weights
from .storage.folds import Folds, weight_exponent
from .storage.precision import SCALE_SUFFIX, StoragePolicy
from .storage.stored import StoredTensor, total_bytes
from .weights.folding import free_folds
from .weights.int4_layers import worst_linears
from .weights.rebalance import Rebalancing
from .weights.streaming import by_block, stored_tensors, write_weights

_WEIGHTS = "weights.safetensors"
_LIKE = "transformer"  # the component whose blocks a ControlNet's are like


@dataclass(frozen=True)
class ControlOptions:
    """What to make."""

    precision: Precision = Precision.FP32
    places: Sequence[int] | None = None  # of the hints, where neither the file nor its size says
    verify: bool = False  # measure the programs against the file
    force: bool = False  # replace a ControlNet that is already there


def export_controlnet(path: Path, out: Path, options: ControlOptions, progress: Progress) -> ControlNet:
    """Exports a ControlNet's file to a folder at `out` and returns it opened.

    Raises `CheckpointError` for a file that is no ControlNet of Z-Image, or is damaged, and `ExportError` for an output
    that already exists, a full disk or a failed self-check. In every case, `out` is either untouched or complete.
    """
    check_target(out, options.force)
    file = open_control_file(path, options.places)
    folds = free_folds(file.weights, file.config.blocks)
    balance = Rebalancing(_Blocks(file.weights), only_far=options.precision is Precision.INT4)
    policy = StoragePolicy(options.precision)
    if options.precision is Precision.INT4:
        plain = StoragePolicy(Precision.FP32)
        _tensors(file, _graphs(file, plain, {}, ("cpu",)), plain, {})  # checks shapes
        worst = worst_linears(file.weights, balance, _LIKE, file.config.blocks)
        policy = dataclasses.replace(policy, eight_bits=frozenset(f"{COMPONENT}/{name}" for name in worst))
    graphs = _graphs(file, policy, folds, CONTROL_SETS)
    tensors = _tensors(file, graphs, policy, folds, balance if policy.rebalanced else None)
    needed = total_bytes(tensors)
    check_disk(out, needed)
    progress.note(
        f"exporting {file.name}, a ControlNet of version {file.config.version}, as {options.precision}: "
        f"{needed / 1e9:.2f} GB will be written to {out}"
    )
    with replaced_directory(out) as folder:
        written = ControlNet(folder, _write(folder, file, graphs, tensors, folds, options.precision, progress))
        checked = check_control(written, file if options.verify else None)
        manifest = dataclasses.replace(written.manifest, self_check=checked.outputs, parity=checked.parity)
        write_control_manifest(folder, manifest)
    return ControlNet.open(out)


@dataclass(frozen=True)
class _Blocks:
    """A ControlNet's tensors as those of what its blocks are like. Implements `Rebalanced`."""

    tensors: Weights

    def weights(self, component: str) -> Weights:
        return self.tensors

    def heads(self, component: str) -> SharedHeads:
        return SharedHeads()


def _graphs(file: ControlFile, policy: StoragePolicy, folds: Folds, sets: Iterable[str]) -> list[Graph]:
    """The programs of a ControlNet for every executor that its precision is for."""
    targets = [
        Target(name, policy, {COMPONENT: folds}) for name in sets if policy.precision in PROGRAM_SETS[name].precisions
    ]
    return [
        ControlGraphs(file.config, target).build(program)
        for target in targets
        for program in control_programs(file.config, target)
    ]


def _tensors(
    file: ControlFile,
    graphs: Iterable[Graph],
    policy: StoragePolicy,
    folds: Folds,
    balance: Rebalancing | None = None,
) -> list[StoredTensor]:
    """The tensors that the programs use. Raises `CheckpointError` for one that is missing or has another shape."""
    plan: dict[str, StoredTensor] = {}
    for stored, shape in ((name, shape) for graph in graphs for name, shape in graph.weights.items()):
        name = stored.removesuffix(SCALE_SUFFIX)
        if name not in plan:
            exponent, factors = weight_exponent(folds, name), balance.factors(_LIKE, name) if balance else None
            made = stored_tensors(file.weights, policy, COMPONENT, name, shape, exponent, factors)
            plan.update({tensor.name: tensor for tensor in made})
    return by_block(plan)


def _write(
    folder: Path,
    file: ControlFile,
    graphs: Iterable[Graph],
    tensors: list[StoredTensor],
    folds: Folds,
    precision: Precision,
    progress: Progress,
) -> ControlManifest:
    with progress.task("weights", total_bytes(tensors), in_bytes=True) as advance:
        files: dict[str, FileRecord] = {_WEIGHTS: write_weights(folder / _WEIGHTS, tensors, advance)}
    programs: dict[Program, dict[str, ProgramRecord]] = {}
    for graph in graphs:
        record, written = write_program(folder, file_name(graph), graph, folder / _WEIGHTS)
        programs.setdefault(graph.program, {})[graph.executor] = record
        files[record.path] = written
    return ControlManifest(
        precision=precision,
        source=Origin(file.name),
        exporter=f"zimage-export {version('zimage-rt')}",
        config=file.config,
        programs=programs,
        weights=_WEIGHTS,
        files=files,
        folds={block: vars(fold) for block, fold in folds.items()},
    )
