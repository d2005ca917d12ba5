"""A batch from its file to its manifest, on this machine."""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import RequestError, ZImageRuntimeError
from zimage_runtime.pipeline import Pipeline

from .generate import ImageGenerator, Outcome, Steps
from .items import Check, Item, check_rows, groups
from .manifest import MANIFEST, read_manifest, write_manifest
from .records import Record, is_done, keep_latents, read_record, recorded_keys
from .rows import read_rows
from .store import FolderStore, Store, open_store

Runs = Callable[[list[Item]], Generator[Steps | Outcome, None, None]]
"""Generates items, in any order."""


class BadRowsError(ZImageRuntimeError):
    """Rows are wrong, each of which was reported."""


class FailedRowsError(ZImageRuntimeError):
    """Rows could not be generated, each of which was reported."""


@dataclass(frozen=True)
class BatchOptions:
    """What decides a batch beside the pipeline."""

    rows: Path
    output: str  # a folder, or a URL
    metadata: bool = True
    fail_fast: bool = False


@dataclass
class Summary:
    """What a batch came to."""

    rows: int
    before: int = 0  # images that were there already
    images: int = 0  # that were generated now
    seconds: float = 0.0
    failed: list[tuple[Item, str]] = field(default_factory=list)
    manifest: str = ""

    def document(self) -> dict[str, Any]:
        """For programs: JSON's own types."""
        return {
            "rows": self.rows,
            "already_there": self.before,
            "generated": self.images,
            "failed": [{"line": item.line, "id": item.id, "error": why} for item, why in self.failed],
            "manifest": self.manifest,
            "seconds": round(self.seconds, 3),
        }


def checked_items(options: BatchOptions, check: Check, progress: Progress) -> list[Item]:
    """The rows of the file, all of them checked. Each bad one is reported.

    Raises `BadRowsError` if there are any, and `RequestError` for a file that cannot be read.
    """
    rows = read_rows(options.rows)
    with progress.task("checking", len(rows), unit="row") as advance:
        items, bad = check_rows(rows, options.rows.absolute().parent, check, metadata=options.metadata, advance=advance)
    for one in bad:
        progress.warn(f"{options.rows}:{one.line}: {one.why}")
    if bad:
        number = f"{len(bad)} of {len(rows)} rows are" if len(bad) > 1 else f"1 of {len(rows)} rows is"
        raise BadRowsError(f"{options.rows}: {number} wrong; nothing was generated")
    if cut := [item for item in items if item.cut_tokens]:
        what = f"the prompts of {len(cut)} rows are" if len(cut) > 1 else "the prompt of a row is"
        lines = ", ".join(str(item.line) for item in cut[:5]) + (", …" if len(cut) > 5 else "")
        progress.warn(f"{options.rows}: {what} longer than the model sees, and cut: lines {lines}")
    return items


@dataclass
class Batch:
    """Generates what is missing, and writes the manifest."""

    options: BatchOptions
    items: Sequence[Item]
    progress: Progress
    written: Callable[[Record, str], object] = lambda record, where: None  # called with each new image, and where it is
    clock: Callable[[], float] = time.perf_counter

    def run(self, runs: Runs) -> Summary:
        """Generates with `runs`.

        Raises `FailedRowsError`, `RequestError` for a folder that cannot be used, or `OSError`.
        """
        store = open_store(self.options.output)
        with store.alone() if isinstance(store, FolderStore) else contextlib.nullcontext():
            earlier = read_manifest(store)
            records = self._records(store, earlier)
            summary = Summary(len(self.items), before=len(records), manifest=store.location(MANIFEST))
            if summary.before:
                self.progress.note(f"{summary.before} of {summary.rows} images are already there")
            pending = {item.key: item for item in self.items if item.key not in records}
            begin = self.clock()
            if pending:
                self._generate(store, pending, runs, records, summary)
            summary.seconds = self.clock() - begin
            errors = {item.key: why for item, why in summary.failed}
            write_manifest(store, self.items, {**earlier, **records}, errors, set(earlier))
            keep_latents(store, errors)  # and what a kill between two files has left
            store.tidy()
        return summary

    def _records(self, store: Store, earlier: Mapping[str, Record]) -> dict[str, Record]:
        """The records of the rows whose images are there, by key.

        Raises `RequestError` where an image would replace a file that is no batch's.
        """
        loose = (read_record(store, key) for key in recorded_keys(store))
        known = {**earlier, **{record.key: record for record in loose if record is not None}}
        found = {}
        with self.progress.task("looking for images", len(self.items), unit="row") as advance:
            for item in self.items:
                record = known.get(item.key)
                if record is not None and is_done(store, record):
                    found[item.key] = record
                advance(1)
        ours, there = {record.file for record in known.values()}, set(store.names(""))
        for item in self.items:
            if item.file in there and item.file not in ours:
                where = store.location(item.file)
                raise RequestError(f"{where}: is there, and no batch made it; remove it, or choose another folder")
        return found

    def _generate(
        self, store: Store, pending: Mapping[str, Item], runs: Runs, records: dict[str, Record], summary: Summary
    ) -> None:
        left = {key: item.steps for key, item in pending.items()}
        events = contextlib.closing(runs(list(pending.values())))  # what is loaded is freed before anything else ends
        with self.progress.task("generating", sum(left.values())) as advance, events as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, Steps):
                    left[outcome.key] -= outcome.count
                    advance(outcome.count)
                    continue
                advance(left.pop(outcome.key))
                if isinstance(outcome, Record):
                    records[outcome.key] = outcome
                    summary.images += 1
                    with self.progress.aside():
                        self.written(outcome, store.location(outcome.file))
                    continue
                item = pending[outcome.key]
                if self.options.fail_fast:
                    raise FailedRowsError(f"{self.options.rows}:{item.line}: {item.id}: {outcome.why}")
                summary.failed.append((item, outcome.why))


def in_groups(pipeline: Pipeline, options: BatchOptions) -> Runs:
    """Generates on a pipeline of this process."""

    def runs(items: list[Item]) -> Generator[Steps | Outcome, None, None]:
        generator = ImageGenerator(pipeline, open_store(options.output), options.metadata)
        for group in groups(items):
            yield from generator.run(group)

    return runs


def report(summary: Summary, options: BatchOptions, progress: Progress) -> None:
    """Says what a batch came to, and lists the rows that failed. Raises `FailedRowsError` if there are any."""
    if summary.images:
        rate = summary.images / summary.seconds
        progress.note(f"{summary.images} images in {summary.seconds:.1f} s, {rate:.3g} images/s")
    for item, why in summary.failed:
        progress.warn(f"{options.rows}:{item.line}: {item.id}: {why}")
    if summary.failed:
        raise FailedRowsError(
            f"{len(summary.failed)} of {summary.rows} rows failed; run the same command again to try them again"
        )
