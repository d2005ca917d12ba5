"""Measurements in processes of their own: their memory seen from outside, their answers, what they raised.

A script answers as a child by ``--child KIND JSON``: the last line that it prints is the result, as JSON.
"""

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .process_memory import HostMemory, read_host_memory, read_own_memory

Answer = dict[str, Any]
Measures = Mapping[str, Callable[[Answer], Any]]
"""What a script measures in children, by kind: options to a result, both in JSON's types."""

_INTERVAL = 0.003  # seconds between two looks at a process's memory


@dataclass
class Peak:
    """The most memory that a process used, in bytes."""

    anonymous: int = 0  # its own: heap, arenas, packed weights
    file: int = 0  # mapped files: the page cache's, which yields under pressure
    seconds: float = 0.0
    read: int = 0  # bytes of read calls; mapped pages do not count
    written: int = 0  # bytes of write calls
    resident: int = 0  # the most of both kinds at once

    def see(self, now: HostMemory | None) -> None:
        """Counts one look."""
        if now is not None:
            self.anonymous, self.file = max(self.anonymous, now.anonymous or 0), max(self.file, now.mapped or 0)
            self.resident = max(self.resident, now.resident)


def measure_child(command: Sequence[str]) -> tuple[Peak, str]:
    """Runs a command to its end and watches its memory. Returns the peak and its standard output.

    Linux only: reads /proc. A peak shorter than a few milliseconds may be missed. Raises `RuntimeError` with the
    end of standard error where the command fails.
    """
    start, peak = time.perf_counter(), Peak()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None:
        peak.see(read_host_memory(child.pid))
        read, written = _moved(Path(f"/proc/{child.pid}/io"))
        peak.read, peak.written = max(peak.read, read), max(peak.written, written)
        time.sleep(_INTERVAL)
    out, err = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{command[-1][:200]} failed: {err.strip()[-500:]}")
    peak.seconds = time.perf_counter() - start
    return peak, out


@contextmanager
def own_peak(look: Callable[[], HostMemory | None] = read_own_memory) -> Iterator[Peak]:
    """Watches this process from a thread. `look` may read the memory of another kind."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL):
            peak.see(look())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _moved(io: Path) -> tuple[int, int]:
    """Bytes that a process has read and written through system calls; zeros when it is gone."""
    try:
        fields = dict(line.split(": ") for line in io.read_text().splitlines())
        return int(fields["rchar"]), int(fields["wchar"])
    except (OSError, ValueError, KeyError):
        return 0, 0


def cli_child(module: str, *words: str) -> list[str]:
    """The command that runs the `main` of a command line's module."""
    run = f"import sys; from {module} import main; sys.argv = ['zimage', *sys.argv[1:]]; main()"
    return [sys.executable, "-c", run, *words]


def script_child(script: str, kind: str, options: Answer) -> list[str]:
    """The command with which a script measures as a child."""
    return [sys.executable, script, "--child", kind, json.dumps(options)]


def run_child(script: str, kind: str, options: Answer, **environment: str) -> Answer:
    """Runs a script's measurement in a process of its own, for at most `options["limit"]` seconds.

    What it raises is its result, as ``{"failed": reason}``, so that the other measurements go on.
    """
    what = (kind, options.get("executor", ""), options.get("precision", ""), options.get("size", ""))
    print(time.strftime("%H:%M:%S"), *what, file=sys.stderr, flush=True)
    limit = options.get("limit")
    try:
        done = subprocess.run(
            script_child(script, kind, options),
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired as late:
        said = late.stderr or b""  # bytes, whatever `text` says
        print(said.decode(errors="replace") if isinstance(said, bytes) else said, file=sys.stderr, flush=True)
        return {"failed": f"not done in {limit} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:500]}
    result: Answer = json.loads(lines[-1])
    return result


def answer_as_child(measures: Measures, kind: str, options: str) -> None:
    """Prints what a measurement gives, in the process that was started for it. `options` is JSON."""
    asked: Answer = json.loads(options)
    if "limit" in asked:
        faulthandler.dump_traceback_later(max(asked["limit"] - 3, 1))  # where it was, should it be too slow
    print(json.dumps(measures[kind](asked)))


def one_line(error: Exception) -> str:
    """An error's class and the start of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
