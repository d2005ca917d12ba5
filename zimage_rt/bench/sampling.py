"""Watching a process at a steady interval, from outside."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from zimage_runtime.machine.nvml import Unmeasured

from .process_memory import NOT_SPLIT, HostMemory
from .schema import Reading, StageMemory, absent

INTERVAL = 0.01
"""Seconds between two samples."""

TRACE_POINTS = 240
"""Points of a trace that a row keeps."""


@dataclass(frozen=True)
class Sample:
    """What one look found, in bytes; for a GPU, the value or why there is none."""

    time: float  # seconds, of the clock that all processes of the machine share
    host: HostMemory | None
    gpu_process: int | Unmeasured
    gpu_used: int | Unmeasured


class Look(Protocol):
    """Looks once at the watched process and the device."""

    def __call__(self, time: float) -> Sample | None:
        """None when the process is gone."""


@dataclass
class PeriodicSampler:
    """Looks every `interval` seconds. A late look is skipped: samples never pile up."""

    look: Look
    clock: Callable[[], float]
    sleep: Callable[[float], object]
    interval: float = INTERVAL
    samples: list[Sample] = field(default_factory=list)

    def watch(self, done: Callable[[], bool]) -> None:
        """Samples until `done`, or until the process is gone."""
        start, tick = self.clock(), 0
        while not done():
            sample = self.look(self.clock())
            if sample is None:
                return
            self.samples.append(sample)
            tick = max(tick + 1, int((self.clock() - start) / self.interval) + 1)
            self.sleep(max(start + tick * self.interval - self.clock(), 0))


@dataclass(frozen=True)
class Border:
    """The end of a stage, and the memory that the process itself saw there."""

    stage: str
    time: float
    host: HostMemory | None = None


@dataclass(frozen=True)
class Gaps:
    """Seconds between samples, as they came."""

    median: Reading
    longest: Reading


def gaps(samples: Sequence[Sample]) -> Gaps:
    """The intervals between samples."""
    found = [after.time - before.time for before, after in itertools.pairwise(samples)]
    if not found:
        none = absent("fewer than two samples")
        return Gaps(none, none)
    return Gaps(Reading(statistics.median(found)), Reading(max(found)))


def host_peak(samples: Iterable[Sample], borders: Iterable[Border], kind: str) -> Reading:
    """The peak of `resident`, `anonymous` or `mapped` bytes, over samples and borders."""
    looks: list[Sample | Border] = [*samples, *borders]
    seen = [one.host for one in looks if one.host is not None]
    values = [value for memory in seen if (value := getattr(memory, kind)) is not None]
    if values:
        return Reading(max(values))
    return absent(NOT_SPLIT if seen else "the process ended before it was sampled")


def gpu_peak(samples: Sequence[Sample]) -> Reading:
    """The peak of the process on the device, or why it is unknown."""
    values = [sample.gpu_process for sample in samples if not isinstance(sample.gpu_process, Unmeasured)]
    if values:
        return Reading(max(values))
    return absent(_last_reason([sample.gpu_process for sample in samples]))


def device_delta(samples: Sequence[Sample], before: int | Unmeasured) -> Reading:
    """The most by which the whole device's use grew since before the process started."""
    if isinstance(before, Unmeasured):
        return absent(before.reason)
    values = [sample.gpu_used for sample in samples if not isinstance(sample.gpu_used, Unmeasured)]
    return Reading(max(values) - before) if values else absent(_last_reason([s.gpu_used for s in samples]))


def _last_reason(values: Sequence[int | Unmeasured]) -> str:
    reasons = [value.reason for value in values if isinstance(value, Unmeasured)]
    return reasons[-1] if reasons else "the process ended before it was sampled"


def bands(start: float, borders: Sequence[Border]) -> tuple[tuple[str, float, float], ...]:
    """Stage, from and to, in seconds since `start`; each stage begins where the one before ended."""
    found, begin = [], start
    for border in borders:
        found.append((border.stage, begin - start, border.time - start))
        begin = border.time
    return tuple(found)


def stage_peaks(start: float, samples: Sequence[Sample], borders: Sequence[Border]) -> dict[str, StageMemory]:
    """Each stage's peaks, over its samples and the looks at both of its ends."""
    found: dict[str, list[HostMemory]] = {}
    on_gpu: dict[str, list[int]] = {}
    begin, previous, index = start, None, 0
    for border in borders:
        seen = found.setdefault(border.stage, [])
        seen += [host for host in (previous, border.host) if host is not None]
        while index < len(samples) and samples[index].time <= border.time:
            sample, index = samples[index], index + 1
            if sample.time < begin:
                continue
            if sample.host is not None:
                seen.append(sample.host)
            if not isinstance(sample.gpu_process, Unmeasured):
                on_gpu.setdefault(border.stage, []).append(sample.gpu_process)
        begin, previous = border.time, border.host
    return {
        stage: StageMemory(
            max((memory.resident for memory in seen), default=None),
            max((m.anonymous for m in seen if m.anonymous is not None), default=None),
            max((m.mapped for m in seen if m.mapped is not None), default=None),
            max(on_gpu.get(stage, []), default=None),
        )
        for stage, seen in found.items()
    }


Point = tuple[float, int | None, int | None, int | None]


def thinned(start: float, samples: Sequence[Sample], points: int = TRACE_POINTS) -> tuple[Point, ...]:
    """At most `points` points: seconds since `start`, anonymous, mapped, GPU. Each is the peak of its neighbours."""
    if not samples:
        return ()
    size = -(-len(samples) // points)
    groups = [samples[first : first + size] for first in range(0, len(samples), size)]
    return tuple(_point(start, group) for group in groups)


def _point(start: float, group: Sequence[Sample]) -> Point:
    hosts = [sample.host for sample in group if sample.host is not None]
    gpu = [sample.gpu_process for sample in group if not isinstance(sample.gpu_process, Unmeasured)]
    return (
        round(group[0].time - start, 4),
        max((h.anonymous for h in hosts if h.anonymous is not None), default=None),
        # where the system does not separate the two, the total stands for both
        max((h.resident if h.mapped is None else h.mapped for h in hosts), default=None),
        max(gpu, default=None),
    )
