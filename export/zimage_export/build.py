"""Checkpoint → bundle, in a temporary folder beside the target that is renamed when all is well."""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx

from zimage_runtime.bundle import Bundle
from zimage_runtime.contracts import COMPONENTS, Program
from zimage_runtime.files import hash_file
from zimage_runtime.manifest import (
    FORMAT,
    MANIFEST_NAME,
    Defaults,
    FileRecord,
    Manifest,
    Precision,
    ProgramRecord,
    Source,
)
from zimage_runtime.ort import CPU
from zimage_runtime.progress import Progress
from zimage_runtime.tensors import read_header
from zimage_runtime.tokenizer import PromptTokenizer

from .checkpoint import Checkpoint
from .errors import CheckpointError, ExportError
from .graphs import Graph, build_graphs
from .selfcheck import self_check
from .weights import StoredTensor, plan_embeddings, plan_weights, total_bytes, write_weights

DEFAULT_STEPS = 8
_SPARE = 64 << 20  # bytes for programs, tokenizer and the file system's own needs


@dataclass(frozen=True)
class BuildOptions:
    """What to build."""

    precision: Precision = Precision.FP32
    force: bool = False  # replace a bundle that is already there
    revision: str | None = None  # of the checkpoint, for the manifest


def build(model: str | Path, out: str | Path, options: BuildOptions, progress: Progress) -> Bundle:
    """Exports a checkpoint to a bundle at `out` and returns it opened.

    Raises `CheckpointError` for a bad checkpoint and `ExportError` for an output that is in the way, a full disk or
    a failed self-check. Whatever happens, `out` is either untouched or complete.
    """
    target = Path(out)
    checkpoint = Checkpoint.open(model)
    graphs = build_graphs(checkpoint.config)
    weights = plan_weights(checkpoint, graphs, options.precision)
    embeddings = plan_embeddings(checkpoint)
    _check_tokenizer(checkpoint)
    check_target(target, options.force)
    needed = sum(total_bytes(tensors) for tensors in [*weights.values(), embeddings])
    _check_disk(target, needed)
    progress.note(
        f"exporting {checkpoint.name} as {options.precision}: {needed / 1e9:.2f} GB will be written to {target}"
    )
    with replaced_directory(target) as folder:
        manifest = _write(folder, checkpoint, graphs, weights, embeddings, options, progress)
        checked = self_check(Bundle(folder, manifest))
        manifest = dataclasses.replace(manifest, self_check=checked)
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(target)


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    graphs: list[Graph],
    weights: dict[str, list[StoredTensor]],
    embeddings: list[StoredTensor],
    options: BuildOptions,
    progress: Progress,
) -> Manifest:
    files: dict[str, FileRecord] = {}
    streams = {f"{component}/weights.safetensors": tensors for component, tensors in weights.items()}
    streams["text_encoder/embeddings.safetensors"] = embeddings
    with progress.task("weights", sum(total_bytes(t) for t in streams.values()), in_bytes=True) as advance:
        for name, tensors in streams.items():
            (folder / name).parent.mkdir(exist_ok=True)
            files[name] = write_weights(folder / name, tensors, advance)
    programs: dict[Program, dict[str, ProgramRecord]] = {}
    for graph in graphs:
        name = f"{graph.program.component}/{graph.program}.{CPU}.onnx"
        used = _write_program(folder / name, graph)
        files[name] = _record(folder / name)
        programs[graph.program] = {CPU: ProgramRecord(name, used)}
    shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
    files["tokenizer.json"] = _record(folder / "tokenizer.json")
    side = checkpoint.config.vae.sample_size
    return Manifest(
        precision=options.precision,
        source=Source(checkpoint.name, options.revision),
        exporter=f"zimage-export {version('zimage-rt')}",
        config=checkpoint.config,
        defaults=Defaults(side, side, DEFAULT_STEPS),
        programs=programs,
        weights={component: f"{component}/weights.safetensors" for component in COMPONENTS},
        embeddings="text_encoder/embeddings.safetensors",
        tokenizer="tokenizer.json",
        files=files,
    )


def _write_program(path: Path, graph: Graph) -> int:
    """Writes and checks one program; returns the bytes of the weights that it uses."""
    entries = read_header(path.with_name("weights.safetensors"))
    path.write_bytes(graph.to_model("weights.safetensors", entries).SerializeToString())
    onnx.checker.check_model(str(path))
    return sum(entries[name].nbytes for name in graph.weights)


def _record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, hash_file(path))


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    size = PromptTokenizer(checkpoint.tokenizer).vocab_size
    rows = checkpoint.config.text_encoder.vocab_size
    if size > rows:
        raise CheckpointError(f"{checkpoint.tokenizer}: has {size} tokens, the text encoder only {rows} embeddings")


def _check_disk(target: Path, needed: int) -> None:
    free = shutil.disk_usage(_existing_parent(target)).free
    if needed + _SPARE > free:
        raise ExportError(
            f"{target}: no space left: the bundle takes {(needed + _SPARE) / 1e9:.2f} GB, {free / 1e9:.2f} GB is free"
        )


def _existing_parent(target: Path) -> Path:
    parent = target.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return parent


def check_target(target: Path, force: bool) -> None:
    """Raises `ExportError` unless a bundle may be written at `target`.

    With `force` a bundle or an empty folder is replaced; anything else is never touched.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ExportError(f"{target}: already exists; use --force to replace it")
    if not target.is_dir() or target.is_symlink() or (any(target.iterdir()) and not _is_bundle(target)):
        raise ExportError(f"{target}: exists and is no bundle, so --force does not replace it; choose another place")


def _is_bundle(path: Path) -> bool:
    try:
        data = json.loads((path / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    suffix = f"{os.getpid()}-{secrets.token_hex(4)}"
    folder = target.with_name(f".{target.name}.{suffix}.part")
    folder.mkdir()
    try:
        yield folder
        _swap(folder, target, target.with_name(f".{target.name}.{suffix}.old"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, target: Path, aside: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    target.rename(aside)
    try:
        folder.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Removes what exports to the same target left behind when they were killed."""
    import psutil

    for path in target.parent.glob(f".{target.name}.*-*.part"):
        owner = path.name.removeprefix(f".{target.name}.").partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)
