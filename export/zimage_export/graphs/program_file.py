"""A program as a file of a bundle, beside the weights that its initializers point into."""

import math
from collections.abc import Container
from pathlib import Path

import onnx

from zimage_runtime.bundle.files import hash_file
from zimage_runtime.bundle.manifest import CPU, FileRecord, ProgramRecord
from zimage_runtime.bundle.tensors import DType, TensorEntry, read_header
from zimage_runtime.model.programs import Program

from .builder import Graph
from .target import PROGRAM_SETS


def file_name(graph: Graph) -> str:
    """A program's file in its component's folder; modulation always runs on the CPU and names no executor."""
    on_cpu = graph.program is Program.MODULATION and graph.executor == CPU
    return "modulation.onnx" if on_cpu else f"{graph.program}.{graph.executor}.onnx"


def write_program(root: Path, name: str, graph: Graph, weights: Path) -> tuple[ProgramRecord, FileRecord]:
    """Writes and checks one program at `name` inside the bundle. `weights` lies in the same folder."""
    entries, path = read_header(weights), root / name
    path.write_bytes(graph.to_model(weights.name, entries).SerializeToString())
    programs = PROGRAM_SETS[graph.executor]
    onnx.checker.check_model(str(path), full_check=programs.standard)
    used = sum(_in_memory(entries[weight], programs.widened) for weight in graph.weights)
    return ProgramRecord(name, used), FileRecord(path.stat().st_size, hash_file(path))


def _in_memory(entry: TensorEntry, widened: Container[str]) -> int:
    """Bytes of a weight in the executor's memory."""
    return math.prod(entry.shape) * DType.F32.size if entry.dtype in widened else entry.nbytes
