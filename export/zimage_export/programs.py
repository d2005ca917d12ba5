"""Adding programs to a bundle that was exported before they existed. No weight is read or written.

How the weights are stored and folded is read from the bundle, so that neither the checkpoint nor torch is needed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.files import temporary_sibling
from zimage_runtime.bundle.manifest import FileRecord, ProgramRecord, write_manifest
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.programs import Program

from .errors import ExportError
from .graphs import PROGRAM_SETS, Graph, Target, build_graph
from .graphs.program_file import file_name, write_program
from .graphs.program_set import ProgramSet
from .storage.bundle_policy import BundlePolicy
from .storage.folds import read_folds


@dataclass(frozen=True)
class AddedPrograms:
    """A bundle, opened again, and the programs that it gained."""

    bundle: Bundle
    added: tuple[tuple[Program, str, ProgramRecord], ...]  # with the name of each one's set


def add_programs(
    bundle: Bundle, executors: Sequence[str] = (), progress: Progress | None = None, *, lora: bool = False
) -> AddedPrograms:
    """Adds the programs that a bundle lacks, for some executors or for all that its precision has programs for.

    Any program whose file is missing or damaged is written again.

    With `lora`, also those that take LoRA and a ControlNet's hints, of which older ones are replaced.

    The manifest is replaced last: a killed run leaves the bundle as it was, and the next one completes it. Raises
    `ExportError` if an executor has no programs for the precision, or if the weights lack what a program needs, and
    `OSError` with the bundle's name if it cannot be written.
    """
    wanted = [programs for programs in _wanted(bundle, executors) if lora or not programs.extended]
    policy = BundlePolicy.of(bundle)
    folds = read_folds(bundle.manifest.folds)
    graphs = [
        build_graph(program, bundle.manifest.config, Target(programs.name, policy, folds))
        for programs in PROGRAM_SETS.values()
        for program in programs.of(bundle.manifest.precision)
        if (programs.extended and programs in wanted) or _lacks(bundle, program, programs, wanted)
    ]
    sets = list(PROGRAM_SETS.values())
    graphs = [
        graph
        for graph in graphs
        if _lacks(bundle, graph.program, PROGRAM_SETS[graph.executor], sets) or _is_older(bundle, graph)
    ]
    for graph in graphs:  # all of them, before anything is written
        _check_weights(bundle, policy, graph)
    if not graphs:
        return AddedPrograms(bundle, ())
    records = {program: dict(of) for program, of in bundle.manifest.programs.items()}
    files, added, replaced = dict(bundle.manifest.files), [], []
    try:
        with (progress or Progress(quiet=True)).task("programs", len(graphs)) as advance:
            for graph in graphs:
                record, file = _write(bundle, graph)
                before = records.setdefault(graph.program, {}).get(graph.executor)
                if before is not None:
                    files.pop(before.path, None)
                    replaced.append(before.path)
                records[graph.program][graph.executor] = record
                files[record.path] = file
                added.append((graph.program, graph.executor, record))
                advance(1)
        write_manifest(bundle.root, bundle.manifest.with_programs(records, files))
        for path in set(replaced) - set(files):
            bundle.file(path).unlink(missing_ok=True)
    except OSError as error:  # which would name a temporary file, or nothing
        raise OSError(error.errno, error.strerror or str(error), str(bundle.root)) from None
    return AddedPrograms(Bundle.open(bundle.root), tuple(added))


def _lacks(bundle: Bundle, program: Program, programs: ProgramSet, wanted: Sequence[ProgramSet]) -> bool:
    """Whether a wanted program is not listed, or any is whose file is missing or of another size."""
    record = bundle.manifest.record(program, programs.name)
    if record is None:
        return programs in wanted
    path = bundle.file(record.path)
    return not path.is_file() or path.stat().st_size != bundle.manifest.files[record.path].size


def _is_older(bundle: Bundle, graph: Graph) -> bool:
    """Whether a bundle's program is of an earlier version, with other inputs."""
    import onnx

    record = bundle.manifest.record(graph.program, graph.executor)
    assert record is not None
    model = onnx.load(str(bundle.file(record.path)), load_external_data=False)
    return {value.name for value in model.graph.input} != graph.input_names


def _wanted(bundle: Bundle, executors: Sequence[str]) -> list[ProgramSet]:
    precision = bundle.manifest.precision
    for executor in executors:
        sets = [programs for programs in PROGRAM_SETS.values() if programs.executor == executor]
        if not any(programs.of(precision) for programs in sets):
            served = {p.value for programs in sets for p in programs.precisions if programs.programs}
            others = f"; export the model in {' or '.join(sorted(served))}" if served else ""
            raise ExportError(f"{bundle.root}: {executor} has no programs for a bundle in {precision}{others}")
    return [programs for programs in PROGRAM_SETS.values() if not executors or programs.executor in executors]


def _check_weights(bundle: Bundle, policy: BundlePolicy, graph: Graph) -> None:
    component, what = graph.program.component, f"the {graph.program} program for {graph.executor}"
    for name, shape in graph.weights.items():
        entry, dtype = policy.headers[component].get(name), graph.types[name]
        if entry is not None and (entry.dtype, entry.shape) == (dtype, shape):
            continue
        found = "none" if entry is None else f"{entry.dtype} of shape {list(entry.shape)}"
        raise ExportError(
            f"{bundle.file(bundle.manifest.weights[component])}: {what} needs {name}, {dtype} of shape {list(shape)}, "
            f"but the file has {found}; export the bundle again"
        )


def _write(bundle: Bundle, graph: Graph) -> tuple[ProgramRecord, FileRecord]:
    """Writes a program into the folder of its weights, under a name that the manifest does not list yet."""
    weights = bundle.manifest.weights[graph.program.component]
    folder = weights.rpartition("/")[0]

    def inside(name: str) -> str:
        return f"{folder}/{name}" if folder else name

    root, name = bundle.root, inside(file_name(graph))
    temporary = temporary_sibling(root / name)
    try:
        record, file = write_program(root, inside(temporary.name), graph, bundle.file(weights))
        if name in bundle.manifest.files and (root / name).exists():  # it stays until the manifest is replaced
            name = inside(f"{file_name(graph).removesuffix('.onnx')}.{file.sha256[:8]}.onnx")
        os.replace(temporary, root / name)
    finally:
        temporary.unlink(missing_ok=True)
    return ProgramRecord(name, record.weight_bytes), file
