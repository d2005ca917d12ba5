"""Names of the frame for scripts that have not been moved to `zimage_rt.bench.script` yet."""

from pathlib import Path
from typing import Any

from zimage_rt.bench.accuracy import relative_error
from zimage_rt.bench.children import Peak, cli_child, measure_child
from zimage_rt.bench.environment import describe, machine
from zimage_rt.bench.script import RESULTS, write_results
from zimage_rt.bench.steps import open_session
from zimage_rt.bench.synthetic import full_size_checkpoint, prepared, synthesize_words
from zimage_rt.bench.tables import markdown_table, mib
from zimage_rt.bench.timing import Ratio, interleave, ratio
from zimage_runtime.machine.cores import thread_count as physical_threads

__all__ = [
    "RESULTS",
    "Peak",
    "Ratio",
    "cli_child",
    "describe",
    "full_size_checkpoint",
    "interleave",
    "machine",
    "markdown_table",
    "measure_child",
    "mib",
    "open_session",
    "physical_threads",
    "prepared_bundle",
    "ratio",
    "relative_error",
    "synthesize_words",
    "write_results",
]


def prepared_bundle(work: Path, name: str, scale: Any) -> tuple[Path, Path]:
    """A checkpoint of random weights and its fp32 bundle in `work`."""
    return prepared(work, name, scale)
