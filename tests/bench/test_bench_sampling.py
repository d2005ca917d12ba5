"""The samplers: a steady interval by a fake clock, a process whose memory is known, and an NVML that says no."""

import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from zimage_rt.bench.process_memory import HostMemory, read_host_memory
from zimage_rt.bench.sampling import (
    Border,
    PeriodicSampler,
    Sample,
    bands,
    device_delta,
    gaps,
    gpu_peak,
    host_peak,
    stage_peaks,
    thinned,
)
from zimage_runtime.machine.nvml import NOT_LISTED, Unmeasured

MIB = 1 << 20
NO_GPU = Unmeasured("no GPU")


@dataclass
class FakeClock:
    """Time passes only in calls of `sleep`."""

    now: float = 100.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def sample(at: float, anonymous: int = 0, mapped: int = 0, gpu: int | Unmeasured = NO_GPU) -> Sample:
    return Sample(at, HostMemory(anonymous + mapped, anonymous, mapped), gpu, gpu)


def watched(clock: FakeClock, durations: list[float], interval: float = 0.01) -> list[float]:
    """Times of the samples, where the looks take so long."""
    left = list(durations)

    def look(at: float) -> Sample:
        clock.now += left.pop(0)
        return sample(at)

    sampler = PeriodicSampler(look, clock, clock.sleep, interval)
    sampler.watch(lambda: not left)
    return [round(one.time - 100, 6) for one in sampler.samples]


def test_samples_come_at_the_interval_however_long_a_look_takes() -> None:
    assert watched(FakeClock(), [0.001, 0.004, 0.002, 0.009, 0.0]) == [0.0, 0.01, 0.02, 0.03, 0.04]


def test_a_late_look_is_left_out_and_not_made_up_for() -> None:
    clock = FakeClock()
    assert watched(clock, [0.001, 0.027, 0.001, 0.001]) == [0.0, 0.01, 0.04, 0.05]
    assert min(clock.slept) >= 0


def test_sampling_ends_with_the_process() -> None:
    clock = FakeClock()
    looks = iter([sample(0), sample(1), None])
    sampler = PeriodicSampler(lambda _: next(looks), clock, clock.sleep)
    sampler.watch(lambda: False)
    assert len(sampler.samples) == 2


def test_gaps_are_reported_as_they_came() -> None:
    reached = gaps([sample(t) for t in (0.0, 0.01, 0.02, 0.05)])
    assert reached.median.value == pytest.approx(0.01)
    assert reached.longest.value == pytest.approx(0.03)
    assert gaps([sample(0.0)]).median.value is None


CHILD = """
import mmap, sys
anonymous, mapped, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("before", flush=True); sys.stdin.readline()
held = bytearray(anonymous)
for at in range(0, anonymous, 4096):
    held[at] = 1
with open(path, "rb") as file:
    view = mmap.mmap(file.fileno(), mapped, prot=mmap.PROT_READ)
total = sum(view[at] for at in range(0, mapped, 4096))
print("held", flush=True); sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux separates own memory from mapped files")
@pytest.mark.parametrize(("anonymous", "mapped"), [(96 * MIB, 48 * MIB), (24 * MIB, 160 * MIB)])
def test_a_process_that_allocates_a_known_amount_is_measured(anonymous: int, mapped: int, tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(mapped))
    words = [sys.executable, "-c", CHILD, str(anonymous), str(mapped), str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        before = read_host_memory(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()

        def look(at: float) -> Sample | None:
            memory = read_host_memory(child.pid)
            return None if memory is None else Sample(at, memory, NO_GPU, NO_GPU)

        sampler = PeriodicSampler(look, time.monotonic, time.sleep)
        said = child.stdout
        sampler.watch(lambda: bool(select.select([said], [], [], 0)[0]))  # until it says that it holds everything
        last = look(time.monotonic())
        child.stdin.write("\n")
        child.stdin.close()
    assert before is not None
    assert before.anonymous is not None
    assert before.mapped is not None
    assert last is not None
    samples = [*sampler.samples, last]
    own, files = (host_peak(samples, [], kind).value or 0 for kind in ("anonymous", "mapped"))
    assert own - before.anonymous == pytest.approx(anonymous, rel=0.05)
    assert files - before.mapped == pytest.approx(mapped, rel=0.05)


def test_a_peak_that_is_given_back_still_counts_wherever_it_was_seen() -> None:
    samples = [sample(0, 10, 90), sample(1, 200, 5), sample(2, 5, 5)]
    borders = [Border("load", 1.5, HostMemory(310, 110, 200)), Border("save", 3, HostMemory(5, 5, 0)), Border("x", 4)]
    peaks = {kind: host_peak(samples, borders, kind).value for kind in ("anonymous", "mapped", "resident")}
    assert peaks == {"anonymous": 200, "mapped": 200, "resident": 310}
    assert host_peak([], [], "resident").value is None


def test_a_process_that_is_gone_has_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        child.wait()
    assert read_host_memory(child.pid) is None


def test_stages_take_the_samples_that_lie_in_them_and_the_looks_at_their_ends() -> None:
    borders = [
        Border("load", 1.0, HostMemory(30, 20, 10)),
        Border("step", 2.0, HostMemory(50, 40, 10)),
        Border("step", 3.0, HostMemory(45, 35, 10)),
        Border("decode", 4.0, HostMemory(5, 5, 0)),
    ]
    samples = [sample(0.5, 10), sample(1.5, 200, gpu=7), sample(2.5, 100, gpu=9), sample(3.5, 60)]
    peaks = stage_peaks(0.0, samples, borders)
    assert peaks["load"].anonymous == 20
    assert peaks["step"].anonymous == 200
    assert peaks["step"].gpu == 9
    assert peaks["decode"].anonymous == 60
    assert peaks["decode"].gpu is None
    assert bands(0.5, borders)[1] == ("step", 0.5, 1.5)


def test_a_thinned_trace_keeps_the_peak() -> None:
    samples = [sample(at / 100, anonymous=1000 if at == 777 else at % 10) for at in range(2000)]
    points = thinned(0.0, samples, points=50)
    assert len(points) <= 50
    assert max(point[1] or 0 for point in points) == 1000


def test_a_gpu_that_reports_nothing_is_no_value_with_its_reason() -> None:
    peak = gpu_peak([sample(0.0, gpu=NOT_LISTED)])
    assert (peak.value, peak.reason) == (None, NOT_LISTED.reason)


def test_a_process_that_is_not_listed_yet_does_not_hide_its_later_peak() -> None:
    peak = gpu_peak([sample(0.0, gpu=NOT_LISTED), sample(1.0, gpu=5), sample(2.0, gpu=3)])
    assert peak.value == 5


def test_the_device_delta_is_of_what_was_in_use_before() -> None:
    assert device_delta([sample(0.0, gpu=700), sample(1.0, gpu=900)], 600).value == 300
    assert device_delta([sample(0.0, gpu=700)], NO_GPU).reason == "no GPU"
