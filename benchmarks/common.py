"""What the benchmarks share: the machine's description, a child process's memory, interleaved timing, tables."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")

_INTERVAL = 0.003  # seconds between two looks at a child's memory


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory and the versions of packages; nothing that names this very machine."""
    import psutil

    return {
        "cpu": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "vector_instructions": _vector_instructions(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _cpu_fields() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_model() -> str:
    fields = _cpu_fields()
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _vector_instructions() -> list[str]:
    flags = _cpu_fields().get("flags", "").split()
    return [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16") if flag in flags]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(description: Mapping[str, Any]) -> str:
    """The machine in one line of text."""
    packages = ", ".join(f"{name} {number}" for name, number in description["packages"].items())
    return (
        f"{description['cpu']}, {description['physical_cores']} cores "
        f"({' '.join(description['vector_instructions']) or 'no AVX2'}), {description['memory_gib']} GiB, "
        f"{description['system']}, Python {description['python']}, {packages}"
    )


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
    status = Path(f"/proc/{child.pid}/status")
    anonymous = file = read = written = resident = 0
    while child.poll() is None:
        now, moved = _resident(status), _moved(status.with_name("io"))
        anonymous, file = max(anonymous, now[0]), max(file, now[1])
        read, written, resident = max(read, moved[0]), max(written, moved[1]), max(resident, sum(now))
        time.sleep(_INTERVAL)
    out, err = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{command[-1][:200]} failed: {err.strip()[-500:]}")
    return Peak(anonymous, file, time.perf_counter() - start, read, written, resident), out


def _resident(status: Path) -> tuple[int, int]:
    """Anonymous and file pages of a process, bytes; zeros when it is gone."""
    found = {}
    try:
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                found[name] = int(value.split()[0]) << 10
    except OSError:
        return 0, 0
    return found.get("RssAnon", 0), found.get("RssFile", 0)


def _moved(io: Path) -> tuple[int, int]:
    """Bytes that a process has read and written through system calls; zeros when it is gone."""
    try:
        fields = dict(line.split(": ") for line in io.read_text().splitlines())
        return int(fields["rchar"]), int(fields["wchar"])
    except (OSError, ValueError, KeyError):
        return 0, 0


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


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are numbers, set right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_results(name: str, document: Mapping[str, Any], markdown: str, folder: Path = RESULTS) -> None:
    """Writes `name`.json and `name`.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")


def prepared_bundle(work: Path, name: str, scale: Any) -> tuple[Path, Path]:
    """A checkpoint of random weights and its bundle in `work`, made when not there. `scale` is a synthetic `Scale`."""
    from zimage_export.build import BuildOptions, build
    from zimage_export.synthetic import write_checkpoint
    from zimage_runtime.progress import Progress

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
    from zimage_runtime.threads import thread_count

    return min(thread_count(), os.cpu_count() or 1)
