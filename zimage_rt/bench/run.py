"""The run: case by case, each in a fresh process, each row on the disk before the next case starts."""

import datetime
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runtime.geometry import picture_geometry
from zimage_runtime.manifest import CPU
from zimage_runtime.memory import available_memory
from zimage_runtime.tokenizer import PromptTokenizer

from .accuracy import Reference, judge, read_pixels
from .environment import conditions, environment, setup
from .floor import Rates, cpu_rates, floor_of, unknown_rates
from .host_memory import forget_cached, read_through
from .job import Job
from .jobs import Opened, Planned, Settings, reference_case
from .measure import conditions_of, energy_of, log_tail, median_step, memory_of, planned_memory, times_of
from .nvidia import Gpu, Untold
from .results import NAME, append_row, read_rows
from .sampling import INTERVAL
from .schema import FAILED, OK, OURS, Row
from .watch import Watched, watch

Note = Callable[[str], object]


def _quiet(text: str) -> None:
    pass


@dataclass
class Runner:
    """A run into one folder. Rows that are there already, for the same case on the same setup, are kept."""

    out: Path
    settings: Settings
    bundles: Sequence[Opened]
    gpu: Gpu | Untold
    command: str
    note: Note = _quiet
    rates: Callable[[], Rates] = cpu_rates
    interval: float = INTERVAL
    _references: dict[str, Reference] = field(default_factory=dict)
    _rates: Rates | None = None

    def run(self, cases: Sequence[Planned]) -> list[Row]:
        """Measures what is missing and gives the rows of all cases, in order."""
        for folder in (self.out, self.out / "pictures", self.out / "logs", self.out / "work"):
            folder.mkdir(parents=True, exist_ok=True)
        results = self.out / NAME
        there = {row.key: row for row in read_rows(results)} if results.exists() else {}
        around = environment(self.gpu)
        rows = []
        for number, planned in enumerate(cases, 1):
            key = planned.case.key(setup(around))
            row = there.get(key)
            title = f"[{number}/{len(cases)}] {planned.case.label} {planned.case.size}"
            if row is None or not row.finished:
                self.note(title)
                row = self._measure(planned, key, around)
                append_row(results, row)
                self.note(f"{title}: {_outcome(row)}")
            else:
                self.note(f"{title}: measured before")
            rows.append(row)
        shutil.rmtree(self.out / "work", ignore_errors=True)
        return rows

    def _measure(self, planned: Planned, key: str, around: dict[str, Any]) -> Row:
        case = planned.case
        reference = self._reference(planned)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        page_cache = self._prepare_cache(planned)
        before = conditions()
        watched, picture, log = self._watch(planned, key)
        times = times_of(watched, case, page_cache)
        failure = watched.failure
        if times is None and failure is None:
            failure = "fewer pictures came than were asked for"
        accuracy = None
        if picture.exists() and watched.done is not None:
            accuracy, wrong = judge(read_pixels(picture), case.precision, reference, watched.digests)
            failure = failure or wrong
        if failure and watched.done is None and case.system != OURS and (last := log_tail(log)):
            failure = f"{failure} ({last})" if last not in failure else failure
        config = planned.opened.bundle.manifest.config
        geometry = picture_geometry(case.width, case.height, config)
        tokens = _tokens(planned)
        versions = watched.done.versions if watched.done else {}
        return Row(
            key=key,
            case=case,
            status=FAILED if failure else OK,
            failure=failure,
            times=times,
            memory=memory_of(
                watched, self.interval, *planned_memory(case, planned.opened.bundle.manifest, geometry, tokens)
            ),
            floor=floor_of(case, config, geometry, tokens, self._rates_for(case.executor), median_step(times)),
            accuracy=accuracy,
            energy=energy_of(watched, case),
            conditions=conditions_of(watched, before, conditions()),
            environment={**around, "packages": {**around["packages"], **versions}},
            picture=f"pictures/{picture.name}" if picture.exists() else None,
            command=self.command,
            started=started,
            notes=watched.done.notes if watched.done else (),
        )

    def _watch(self, planned: Planned, name: str) -> tuple[Watched, Path, Path]:
        picture, log = self.out / "pictures" / f"{name}.png", self.out / "logs" / f"{name}.log"
        picture.unlink(missing_ok=True)
        job = Job(planned.case, str(planned.model), str(picture), str(self.out / "work"))
        return watch(job, self.gpu, log, interval=self.interval), picture, log

    def _prepare_cache(self, planned: Planned) -> str:
        """Puts the page cache into a known state, and says which."""
        if planned.case.drop_cache:
            return "dropped" if forget_cached(list(planned.files)) else "as found"
        # half of what is free: the rest is for the process that will be measured
        return "warm" if read_through(list(planned.files), available_memory() // 2) else "as found"

    def _rates_for(self, executor: str) -> Rates:
        if executor != CPU and self._runs_on_gpu(executor):
            return unknown_rates()
        if self._rates is None:
            self._rates = self.rates()
        return self._rates

    def _runs_on_gpu(self, executor: str) -> bool:
        """Executors of ours but `cpu` do; baselines where there is a GPU."""
        ours = any(executor in opened.bundle.manifest.executors for opened in self.bundles)
        return ours or not isinstance(self.gpu, Untold)

    def _reference(self, planned: Planned) -> Reference:
        """The reference's picture of the same prompt, size, steps and seed; drawn once, and kept in the folder."""
        found = reference_case(self.settings, self.bundles, planned.case)
        if isinstance(found, str):
            return Reference(None, None, found)
        name = f"reference-{found.case.key('')}"
        if name not in self._references:
            path = self.out / "pictures" / f"{name}.png"
            title = f"{found.case.label} ({found.case.precision})" if found.case.system == OURS else found.case.label
            if not path.exists():
                self.note(f"    reference: {title} {found.case.size}")
                watched, path, _ = self._watch(found, name)
                if watched.failure:
                    self._references[name] = Reference(None, None, f"the reference failed: {watched.failure}")
            if path.exists():
                self._references[name] = Reference(title, read_pixels(path))
        return self._references[name]


def _tokens(planned: Planned) -> int:
    bundle = planned.opened.bundle
    return len(PromptTokenizer(bundle.file(bundle.manifest.tokenizer)).encode(planned.case.prompt))


def _outcome(row: Row) -> str:
    if row.failure:
        return f"failed: {row.failure}"
    assert row.times is not None
    totals = [draw.total for draw in row.times.draws]
    return f"{sorted(totals)[len(totals) // 2]:.2f} s a picture"


def command_line() -> str:
    """What was run, with folders by their names alone: results name no path of the machine."""
    words = [Path(word).name if "/" in word or "\\" in word else word for word in sys.argv[1:]]
    return " ".join(["zimage-rt", *(f'"{word}"' if " " in word else word for word in words)])
