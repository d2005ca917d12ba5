"""Running one worker: its process, its events, and the samples taken while it runs."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from zimage_runtime.errors import ZImageRuntimeError
from zimage_runtime.machine.gpu_monitor import GpuMonitor
from zimage_runtime.machine.nvml import Unmeasured

from .job import Done, Failed, ImageEnd, StageEnd, WorkerEvent, WorkerJob, decode_event
from .process_memory import read_host_memory
from .sampling import Border, PeriodicSampler, Sample

_STATE_INTERVAL = 0.5  # seconds between two readings of clocks and temperatures, which change slowly


@dataclass(frozen=True)
class Watched:
    """All that is known about a worker's run. Times are of time.monotonic."""

    started: float
    ended: float
    borders: tuple[Border, ...]
    digests: tuple[str, ...]  # of each image's pixels
    done: Done | None
    failure: str | None
    samples: tuple[Sample, ...]
    gpu_used_before: int | Unmeasured
    energy: tuple[tuple[float, float], ...]  # time, joules of the device's own counter
    states: dict[str, tuple[float, ...]]  # power, clocks and temperatures while it ran


@dataclass
class _Look:
    """Looks at a process, and at longer intervals at the device's state."""

    pid: int
    gpu: GpuMonitor | Unmeasured
    states: dict[str, list[float]] = field(default_factory=dict)
    energy: list[tuple[float, float]] = field(default_factory=list)
    _next_state: float = 0.0

    def __call__(self, time: float) -> Sample | None:
        host = read_host_memory(self.pid)
        if host is None:
            return None
        if isinstance(self.gpu, Unmeasured):
            return Sample(time, host, self.gpu, self.gpu)
        if time >= self._next_state:
            self._next_state = time + _STATE_INTERVAL
            for name, value in self.gpu.state().items():
                self.states.setdefault(name, []).append(value)
        joules = self.gpu.energy()
        if not isinstance(joules, Unmeasured):
            self.energy.append((time, joules))
        return Sample(time, host, self.gpu.process_memory(self.pid), self.gpu.used_memory())


def watch(job: WorkerJob, gpu: GpuMonitor | Unmeasured, log: Path, *, interval: float) -> Watched:
    """Runs a job in a fresh process until it ends; an interrupt kills it. What it prints goes to `log`."""
    before = gpu if isinstance(gpu, Unmeasured) else gpu.used_memory()
    command = [sys.executable, "-m", "zimage_rt.bench.worker", job.to_json()]
    log.parent.mkdir(parents=True, exist_ok=True)
    events: list[WorkerEvent] = []
    with log.open("wb") as errors:
        started = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        reader = threading.Thread(target=_collect, args=(process.stdout, events), daemon=True)
        reader.start()
        look = _Look(process.pid, gpu)
        sampler = PeriodicSampler(look, time.monotonic, time.sleep, interval)
        try:
            sampler.watch(lambda: process.poll() is not None)
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join(timeout=10)
        ended = time.monotonic()
    done = next((event for event in events if isinstance(event, Done)), None)
    return Watched(
        started=started,
        ended=ended,
        borders=tuple(Border(e.stage, e.time, e.host) for e in events if isinstance(e, StageEnd)),
        digests=tuple(event.digest for event in events if isinstance(event, ImageEnd)),
        done=done,
        failure=None if done else _failure(events, process.returncode),
        samples=tuple(sampler.samples),
        gpu_used_before=before,
        energy=tuple(look.energy),
        states={name: tuple(values) for name, values in look.states.items()},
    )


def _collect(stream: IO[str], events: list[WorkerEvent]) -> None:
    for line in stream:
        try:
            events.append(decode_event(line))
        except (ValueError, TypeError, AttributeError, json.JSONDecodeError, ZImageRuntimeError):
            events.append(Failed(f"the worker sent {line[:80]!r}"))


def _failure(events: list[WorkerEvent], status: int) -> str:
    for event in events:
        if isinstance(event, Failed):
            return event.reason
    if status < 0:
        return f"the process was killed by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    return f"the process ended with status {status} and without an image; its log says why"
