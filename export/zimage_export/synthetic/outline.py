"""A bundle of the published model whose weights are holes in its files: to plan memory with, not to generate from.

Its programs, its manifest and the sizes of its files are those of an exported checkpoint. The data of the weights is
never written, so that a bundle of 24 GB occupies a few MB on a file system that supports sparse files.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import (
    Defaults,
    FileRecord,
    Manifest,
    Origin,
    Precision,
    ProgramRecord,
    write_manifest,
)
from zimage_runtime.bundle.tensors import DType, TensorEntry, encode_header
from zimage_runtime.model.programs import COMPONENTS, Program

from ..graphs import build_programs
from ..graphs.program_file import file_name, write_program
from ..output import replaced_directory
from ..source.tensors import PlainTensor
from ..storage.precision import StoragePolicy
from ..storage.stored import StoredTensor, total_bytes
from ..weights.streaming import plan_embeddings, plan_weights
from .checkpoint import FULL

_NOT_HASHED = "0" * 64


class _Headers:
    """Tensors of one published type and of whatever shape is asked for, with no data."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype

    def get(self, name: str, shape: tuple[int, ...]) -> PlainTensor:
        nbytes = self._dtype.size
        for side in shape:
            nbytes *= side
        return PlainTensor(name, Path("none"), TensorEntry(self._dtype, shape, 0, nbytes))


def planned_weights(precision: Precision) -> dict[str, list[StoredTensor]]:
    """The tensors of a full-size bundle, by file. They can be counted, not read."""
    text = _Headers(DType.BF16)
    parts = {"transformer": _Headers(DType.F32), "text_encoder": text, "vae": _Headers(DType.BF16)}
    checkpoint: Any = SimpleNamespace(config=FULL.config, weights=parts.__getitem__, text_encoder=text)
    policy = _policy(precision)
    planned = plan_weights(checkpoint, build_programs(FULL.config, policy, {}), policy, {})
    files = {f"{component}/weights.safetensors": tensors for component, tensors in planned.items()}
    return {**files, "text_encoder/embeddings.safetensors": plan_embeddings(checkpoint, policy)}


def write_outline(out: Path, precision: Precision) -> Bundle:
    """Writes the bundle at `out` and opens it. Raises `ExportError` where `out` cannot be written."""
    with replaced_directory(out) as folder:
        files = {name: _write_hollow(folder / name, tensors) for name, tensors in planned_weights(precision).items()}
        programs: dict[Program, dict[str, ProgramRecord]] = {}
        for graph in build_programs(FULL.config, _policy(precision), {}):
            component = graph.program.component
            weights = folder / component / "weights.safetensors"
            record, file = write_program(folder, f"{component}/{file_name(graph)}", graph, weights)
            programs.setdefault(graph.program, {})[graph.executor] = record
            files[record.path] = file
        (folder / "tokenizer.json").write_text("{}")
        files["tokenizer.json"] = FileRecord(2, _NOT_HASHED)
        side = FULL.config.vae.sample_size
        manifest = Manifest(
            precision=precision,
            source=Origin("outline"),
            exporter="zimage-export outline",
            config=FULL.config,
            defaults=Defaults(side, side, 8),
            programs=programs,
            weights={component: f"{component}/weights.safetensors" for component in COMPONENTS},
            embeddings="text_encoder/embeddings.safetensors",
            tokenizer="tokenizer.json",
            files=files,
        )
        write_manifest(folder, manifest)
    return Bundle.open(out)


def _policy(precision: Precision) -> StoragePolicy:
    return StoragePolicy(precision, vae_type=DType.BF16)


def _write_hollow(path: Path, tensors: list[StoredTensor]) -> FileRecord:
    header = encode_header({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    size = len(header) + total_bytes(tensors)
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    return FileRecord(size, _NOT_HASHED)
