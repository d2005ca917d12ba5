"""The run: each case in a fresh process, each row on the disk before the next case starts."""

import datetime
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zimage_runtime.machine.gpu_monitor import GpuMonitor
from zimage_runtime.machine.host_memory import available_memory
from zimage_runtime.machine.nvml import Unmeasured
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.tokenizer import PromptTokenizer

from .accuracy import Reference, judge, read_pixels, unchecked
from .environment import conditions, environment, setup
from .floor import Rates, cpu_rates, floor_of, unknown_rates, why_no_rate
from .job import WorkerJob
from .jobs import Opened, Planned
from .measure import conditions_of, energy_of, log_tail, median_step, memory_of, planned_memory, times_of
from .page_cache import forget_cached, read_through
from .results import NAME, append_row, read_rows
from .sampling import INTERVAL
from .schema import FAILED, OK, OURS, Case, Row
from .systems import REFERENCE, find_system
from .watch import Watched, watch

Note = Callable[[str], object]


def _quiet(text: str) -> None:
    pass


@dataclass
class Runner:
    """A run into one folder. Rows that it already contains, for the same case on the same setup, are kept."""

    out: Path
    bundles: Sequence[Opened]
    gpu: GpuMonitor | Unmeasured
    command: str
    note: Note = _quiet  # progress, which a user may silence
    warn: Note = _quiet  # what the user must see
    interval: float = INTERVAL
    _references: dict[str, Reference] = field(default_factory=dict)
    _rates: Rates | None = None

    def run(self, cases: Sequence[Planned]) -> list[Row]:
        """Measures what is missing and returns the rows of all cases, in order."""
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
                if unchecked(row) and (checked := self._checked(row, planned, around)):
                    row = checked
                    append_row(results, row)
                    self.note(f"{title}: checked now: {_outcome(row)}")
            rows.append(row)
        shutil.rmtree(self.out / "work", ignore_errors=True)
        return rows

    def _measure(self, planned: Planned, key: str, around: dict[str, Any]) -> Row:
        case = planned.case
        reference = self._reference(planned, setup(around))
        picture, log = self._files(case, key)
        model = self._converted(planned)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        page_cache = _prepare_cache(case, model)
        before = conditions()
        watched = self._watch(case, model, picture, log)
        times = times_of(watched, case, page_cache)
        failure = watched.failure
        if times is None and failure is None:
            failure = "fewer images were generated than requested"
        accuracy = None
        if picture.exists() and watched.done is not None:
            accuracy, wrong = judge(read_pixels(picture), case.precision, reference, watched.digests)
            failure = failure or wrong
        if failure and watched.done is None and case.system != OURS and (last := log_tail(log)):
            failure = f"{failure} ({last})" if last not in failure else failure
        config = planned.opened.bundle.manifest.config
        geometry = image_geometry(case.width, case.height, config)
        tokens = _tokens(planned)
        versions = watched.done.versions if watched.done else {}
        on_gpu = watched.done.on_gpu if watched.done else None
        return Row(
            key=key,
            case=case,
            status=FAILED if failure else OK,
            failure=failure,
            times=times,
            memory=memory_of(watched, self.interval, *planned_memory(planned.plan)),
            floor=floor_of(case, config, geometry, tokens, self._rates_for(case, on_gpu), median_step(times)),
            accuracy=accuracy,
            energy=energy_of(watched, case),
            conditions=conditions_of(watched, before, conditions()),
            environment={**around, "packages": {**around["packages"], **versions}},
            picture=f"pictures/{picture.name}" if picture.exists() else None,
            command=self.command,
            started=started,
            notes=watched.done.notes if watched.done else (),
        )

    def _checked(self, row: Row, planned: Planned, around: dict[str, Any]) -> Row | None:
        """A row of an earlier run without a reference, compared with the one that there is now; None without one."""
        picture = self.out / row.picture if row.picture else None
        if picture is None or not picture.exists():
            return None
        reference = self._reference(planned, setup(around))
        if reference.pixels is None or row.accuracy is None:
            return None
        accuracy, wrong = judge(read_pixels(picture), row.case.precision, reference, ())
        accuracy = replace(accuracy, repeatable=row.accuracy.repeatable)
        return replace(row, accuracy=accuracy, status=FAILED if wrong else OK, failure=wrong)

    def _converted(self, planned: Planned) -> Path:
        """The model in the form that its system loads."""
        return find_system(planned.case.system).convert(planned.model, self.out / "work")

    def _watch(self, case: Case, model: Path, picture: Path, log: Path) -> Watched:
        picture.unlink(missing_ok=True)
        return watch(WorkerJob(case, str(model), str(picture)), self.gpu, log, interval=self.interval)

    def _files(self, case: Case, key: str, role: str = "") -> tuple[Path, Path]:
        """The image and the log of a case, named so that people find them."""
        label = re.sub("[^A-Za-z0-9._]+", "-", f"{role}{case.label}-{case.size}")
        name = f"{label}-{key[:8]}"
        return self.out / "pictures" / f"{name}.png", self.out / "logs" / f"{name}.log"

    def _rates_for(self, case: Case, on_gpu: bool | None) -> Rates:
        if reason := why_no_rate(case, on_gpu):
            return unknown_rates(reason)
        if self._rates is None:
            self._rates = cpu_rates()
        return self._rates

    def _reference(self, planned: Planned, setup: str) -> Reference:
        """The reference's image of the same prompt, size, steps and seed; generated once and kept in the folder."""
        found = planned.reference
        if isinstance(found, str):
            return Reference(None, None, found)
        # another system's reference does not change with our commits
        key = found.case.key(setup if found.case.system == OURS else REFERENCE)
        if key not in self._references:
            picture, log = self._files(found.case, key, "reference-")
            title = f"{found.case.label} ({found.case.precision})" if found.case.system == OURS else found.case.label
            failure = None
            if not picture.exists():
                self.note(f"    reference: {title} {found.case.size}")
                failure = self._watch(found.case, self._converted(found), picture, log).failure
            if failure:
                self.warn(f"    the reference failed: {failure}")
                self._references[key] = Reference(None, None, f"the reference failed: {failure}")
            else:
                self._references[key] = Reference(title, read_pixels(picture))
        return self._references[key]


def _prepare_cache(case: Case, model: Path) -> str:
    """Puts the page cache into a known state and returns its name."""
    files = [path for path in model.rglob("*") if path.is_file()]
    if case.drop_cache:
        return "dropped" if forget_cached(files) else "as found"
    # half of what is free: the rest is for the process that will be measured
    return "warm" if read_through(files, available_memory() // 2) else "as found"


def _tokens(planned: Planned) -> int:
    bundle = planned.opened.bundle
    return len(PromptTokenizer(bundle.file(bundle.manifest.tokenizer)).encode(planned.case.prompt))


def _outcome(row: Row) -> str:
    if row.failure:
        return f"failed: {row.failure}"
    assert row.times is not None
    totals = [draw.total for draw in row.times.draws]
    not_checked = f", not checked: {reason}" if (reason := unchecked(row)) else ""
    return f"{statistics.median(totals):.2f} s per image{not_checked}"


def command_line() -> str:
    """The command, with only the names of folders: results name no path of the machine."""
    words = [Path(word).name if "/" in word or "\\" in word else word for word in sys.argv[1:]]
    return " ".join(["zimage-rt", *(f'"{word}"' if " " in word else word for word in words)])
