"""What was watched, as a row states it: stage times, memory, energy."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zimage_runtime.machine.nvml import Unmeasured

from .sampling import Border, bands, device_delta, gaps, gpu_peak, host_peak, stage_peaks, thinned
from .schema import DECODE, IMPORT, LOAD, SAVE, STEP, TEXT, Case, Draw, Memory, Reading, Times, absent
from .watch import Watched


def times_of(watched: Watched, case: Case, page_cache: str) -> Times | None:
    """Stage times; None where images are missing."""
    first = [border for border in watched.borders if border.stage in (IMPORT, LOAD)]
    images = _images(watched.borders)
    if watched.done is None or len(first) != 2 or len(images) != case.warmup + case.repeat:
        return None
    imported, loaded = first
    cold = _draw(loaded.time, images[0])
    begins = [loaded.time, *(borders[-1].time for borders in images)]
    draws = [_draw(begin, borders) for begin, borders in zip(begins, images, strict=False)]
    return Times(
        importing=imported.time - watched.started,
        loading=loaded.time - imported.time,
        cold_picture=cold.total,
        cold_start=images[0][-1].time - watched.started,
        page_cache=page_cache,
        draws=tuple(draws[case.warmup :]),
    )


def _images(borders: Sequence[Border]) -> list[list[Border]]:
    """The borders of each image, which ends where it is saved."""
    found: list[list[Border]] = []
    current: list[Border] = []
    for border in borders:
        if border.stage in (IMPORT, LOAD):
            continue
        current.append(border)
        if border.stage == SAVE:
            found.append(current)
            current = []
    return found


def _draw(begin: float, borders: Sequence[Border]) -> Draw:
    seconds: dict[str, list[float]] = {}
    start = begin
    for border in borders:
        seconds.setdefault(border.stage, []).append(border.time - start)
        start = border.time
    return Draw(
        total=borders[-1].time - begin,
        text=sum(seconds[TEXT]) if TEXT in seconds else None,
        steps=tuple(seconds.get(STEP, ())),
        decode=sum(seconds[DECODE]) if DECODE in seconds else None,
        save=sum(seconds[SAVE]),
    )


def memory_of(watched: Watched, interval: float, planned: dict[str, int], planned_peak: Reading) -> Memory:
    """The memory of a process: peaks, stages and the trace."""
    reached = gaps(watched.samples)
    samples, borders = watched.samples, watched.borders
    allocated = watched.done.gpu_allocated if watched.done else None
    return Memory(
        interval=interval,
        interval_median=reached.median,
        interval_longest=reached.longest,
        resident=host_peak(samples, borders, "resident"),
        anonymous=host_peak(samples, borders, "anonymous"),
        mapped=host_peak(samples, borders, "mapped"),
        gpu_process=gpu_peak(samples),
        gpu_device=device_delta(samples, watched.gpu_used_before),
        gpu_allocator=absent("the system does not report a GPU allocator") if allocated is None else Reading(allocated),
        planned=planned,
        planned_peak=planned_peak,
        stages=stage_peaks(watched.started, samples, borders),
        trace=thinned(watched.started, samples),
        bands=bands(watched.started, borders),
    )


def planned_memory(plan: Mapping[str, Any] | None) -> tuple[dict[str, int], Reading]:
    """What the executor's plan says: bytes by stage, and at its peak."""
    if plan is None:
        return {}, absent("only zimage-rt has a memory plan")
    stages: Mapping[str, Mapping[str, int]] = plan["stages"]
    return {name: stage["bytes"] for name, stage in stages.items()}, Reading(plan["peak"])


def energy_of(watched: Watched, case: Case) -> Reading:
    """Joules per warm image, by the device's own counter, from the end of the last warm-up to the end."""
    if not watched.energy:
        before = watched.gpu_used_before
        return absent(before.reason if isinstance(before, Unmeasured) else "this GPU does not report its energy")
    saved = [border.time for border in watched.borders if border.stage == SAVE]
    if len(saved) != case.warmup + case.repeat or case.warmup < 1 or not case.repeat:
        return absent("images are missing")
    begin, end = _joules_at(watched.energy, saved[case.warmup - 1]), _joules_at(watched.energy, saved[-1])
    return Reading((end - begin) / case.repeat)


def _joules_at(counter: Sequence[tuple[float, float]], time: float) -> float:
    """The counter at a time, between its neighbours in proportion."""
    for (t0, j0), (t1, j1) in itertools.pairwise(counter):
        if t0 <= time <= t1:
            return j0 + (j1 - j0) * ((time - t0) / (t1 - t0) if t1 > t0 else 0.0)
    return counter[-1][1] if time > counter[-1][0] else counter[0][1]


def conditions_of(watched: Watched, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The machine before and after, and a GPU's power, clocks and temperature while the worker ran."""
    during = {
        name: {"least": min(values), "median": statistics.median(values), "most": max(values)}
        for name, values in watched.states.items()
    }
    return {"before": before, "after": after, "during": during}


def median_step(times: Times | None) -> float | None:
    """Seconds of a warm step; None where a system does not report its steps."""
    steps = [seconds for draw in times.draws for seconds in draw.steps] if times else []
    return statistics.median(steps) if steps else None


def log_tail(log: Path) -> str:
    """The last line of a worker's log."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:200] if lines else ""
