"""``report.md`` and ``report.html``, made from rows alone: what a person wants to see first, first."""

import contextlib
import io
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from zimage_runtime.bundle.files import atomic_write

from .blocks import Block, Figure, Grid, Section, Table, Text, Tile, to_html, to_markdown
from .cards import CARDS_GB, RESERVED, TOKENS, card_table
from .environment import describe
from .jobs import Opened
from .measure import median_step
from .plots import peak_bytes, plots, stage_median
from .schema import DECODE, FAILED, SAVE, STEP, TEXT, Reading, Row
from .statistics import summarize
from .tables import digits, gibibytes, seconds, size_of

TITLE = "zimage-rt bench"
_THUMBNAIL = 480  # pixels of the longer side, in the page


def write_report(out: Path, rows: Sequence[Row], bundles: Sequence[Opened]) -> list[Path]:
    """Writes both forms and the plots, and gives the paths of the two."""
    figures = _figures(rows)
    for figure in figures:
        path = out / figure.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(figure.svg)
    sections = make_sections(out, rows, bundles, figures)
    written = []
    for name, text in (("report.md", to_markdown(TITLE, sections)), ("report.html", to_html(TITLE, sections))):
        with atomic_write(out / name) as file:
            file.write(text.encode())
        written.append(out / name)
    return written


def _figures(rows: Sequence[Row]) -> list[Figure]:
    if find_spec("matplotlib") is None:
        return []
    return [Figure(f"plots/{name}.svg", alt, svg) for name, (alt, svg) in plots(rows).items()]


def make_sections(
    out: Path, rows: Sequence[Row], bundles: Sequence[Opened], figures: Sequence[Figure]
) -> list[Section]:
    """The report."""
    sections = [
        Section("Summary", (Text(_first_lines(rows)), summary_table(rows), *_failures(rows))),
        Section("Stages", (Text("Medians of warm pictures; the floor is below each."), stage_table(rows))),
    ]
    sections.append(Section("Memory", (Text(_MEMORY), memory_table(rows))))
    if figures:
        sections.append(Section("Plots", tuple(b for f in figures for b in (Text(f"{f.alt}."), f))))
    else:
        missing = "matplotlib is not installed: pip install 'zimage-rt[report]', then zimage-rt bench --report-only."
        sections.append(Section("Plots", (Text(missing),)))
    sections.append(Section("Pictures", (Text(_pictures_line(rows)), _grid(out, rows))))
    sections.append(Section("Which card can run this?", _cards(rows, bundles)))
    sections.append(Section("How it was measured", tuple(Text(line) for line in _method(rows))))
    sections.append(Section("Where", _where(rows)))
    return sections


def _first_lines(rows: Sequence[Row]) -> str:
    if not rows:
        return "No case was measured."
    failed = sum(row.status == FAILED for row in rows)
    verdict = "none failed" if not failed else f"{failed} failed"
    return f"{len(rows)} cases, {verdict}. {describe(rows[0].environment)}."


def summary_table(rows: Sequence[Row]) -> Table:
    """A row a case."""
    header = (
        "case", "size", "picture, median", "p90", "steps/s", "pictures/min", "cold start", "peak memory",
        "of the floor", "against fp32", "verdict",
    )  # fmt: skip
    return Table(header, tuple(_summary(row) for row in rows), _failed(rows))


def _summary(row: Row) -> tuple[str, ...]:
    if row.times is None:
        return (row.case.label, row.case.size, *["–"] * 8, "failed")
    total = summarize([draw.total for draw in row.times.draws])
    step = median_step(row.times)
    reached = row.floor.step_fraction.value if row.floor else None
    return (
        row.case.label,
        row.case.size,
        seconds(total.median),
        seconds(total.p90),
        digits(1 / step) if step else "–",
        digits(60 / total.median),
        f"{seconds(row.times.cold_start)} ({row.times.page_cache})",
        gibibytes(peak_bytes(row)),
        "–" if reached is None else f"{100 * reached:.0f} %" if reached >= 0.01 else "<1 %",
        accuracy_text(row),
        verdict(row),
    )


def verdict(row: Row) -> str:
    """In a word: "not checked" where there was no reference."""
    if row.status == FAILED:
        return "failed"
    return "ok" if row.accuracy is not None and row.accuracy.reference else "not checked"


def accuracy_text(row: Row) -> str:
    """PSNR, or that the pictures are identical."""
    accuracy = row.accuracy
    if accuracy is None or accuracy.reference is None:
        return "–"
    return "identical" if accuracy.identical else _reading(accuracy.psnr_db, "dB")


def _reading(reading: Reading, unit: str) -> str:
    return "–" if reading.value is None else f"{digits(reading.value)} {unit}".rstrip()


def stage_table(rows: Sequence[Row]) -> Table:
    """Medians and floors of each stage, and what is done once a process."""
    header = (
        "case",
        "size",
        "import",
        "load",
        "first picture",
        "text",
        "a step",
        "decode",
        "encode and save",
        "spread",
    )
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.times is None:
            continue
        once = (row.times.importing, row.times.loading, row.times.cold_picture)
        stages = (stage_median(row, TEXT), median_step(row.times), stage_median(row, DECODE), stage_median(row, SAVE))
        total = summarize([draw.total for draw in row.times.draws])
        spread = "–" if total.deviation is None else f"± {seconds(total.deviation)} of {total.count}"
        lines.append((row.case.label, row.case.size, *map(seconds, (*once, *stages)), spread))
        if row.floor and row.floor.step.value is not None:
            floors = (row.floor.text.value, row.floor.step.value, row.floor.decode.value)
            lines.append(("floor", row.case.size, "", "", "", *map(seconds, floors), "", ""))
    return Table(header, tuple(lines))


_MEMORY = (
    "Peaks. Own memory is anonymous: heap, arenas, packed weights. Mapped files are the page cache's, which yields "
    "when others need it. The plan is zimage-rt's for the host, one stage loaded at a time; here all stay loaded where "
    "they fit. The device's growth is everyone's, a cross-check of the process's."
)


def memory_table(rows: Sequence[Row]) -> Table:
    """Peaks of the process, of its stages, and of the plan."""
    header = (
        "case", "size", "own", "mapped", "own: text", "own: steps", "own: decode", "planned", "GPU process",
        "GPU device, growth", "GPU allocator",
    )  # fmt: skip
    lines = []
    for row in rows:
        if (memory := row.memory) is None:
            continue
        stages = (memory.stages.get(stage) for stage in (TEXT, STEP, DECODE))
        own = [gibibytes(stage.anonymous) if stage else "–" for stage in stages]
        gpu = map(size_of, (memory.planned_peak, memory.gpu_process, memory.gpu_device, memory.gpu_allocator))
        lines.append((row.case.label, row.case.size, size_of(memory.anonymous), size_of(memory.mapped), *own, *gpu))
    return Table(header, tuple(lines))


def _failed(rows: Sequence[Row]) -> frozenset[int]:
    return frozenset(index for index, row in enumerate(rows) if row.status == FAILED)


def _failures(rows: Sequence[Row]) -> tuple[Block, ...]:
    return tuple(Text(f"Failed: {row.case.label} {row.case.size}: {row.failure}.") for row in rows if row.failure)


def _pictures_line(rows: Sequence[Row]) -> str:
    cases = {(row.case.prompt, row.case.seed, row.case.steps) for row in rows}
    return "; ".join(f"“{prompt}”, seed {seed}, {steps} steps" for prompt, seed, steps in sorted(cases)) + "."


def _grid(out: Path, rows: Sequence[Row]) -> Grid:
    sizes = dict.fromkeys(row.case.size for row in rows)
    return Grid(tuple((size, tuple(_tile(out, row) for row in rows if row.case.size == size)) for size in sizes))


def _tile(out: Path, row: Row) -> Tile:
    failed = row.status == FAILED
    flip = row.accuracy.perceptual.value if row.accuracy else None
    seen = "" if flip is None else f", FLIP {flip:.3f}"
    caption = f"{row.case.label}: {accuracy_text(row)}{seen}{', failed' if failed else ''}"
    data = None
    if row.picture is not None:
        with contextlib.suppress(OSError):
            data = _thumbnail(out / row.picture)
    return Tile(caption, row.picture if data else None, data, failed)


def _thumbnail(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _cards(rows: Sequence[Row], bundles: Sequence[Opened]) -> tuple[Block, ...]:
    sizes = {(row.case.width, row.case.height) for row in rows} | {
        (opened.bundle.manifest.defaults.width, opened.bundle.manifest.defaults.height) for opened in bundles
    }
    table = card_table([(opened.name, opened.bundle) for opened in bundles], sizes, rows)
    header = ("model and executor", "size", *(f"{card} GB" for card in CARDS_GB))
    lines = tuple((f"{r.model} {r.executor}", r.size, *(answer.text for answer in r.answers)) for r in table)
    explained = (
        f"Predicted: the memory plan's peak for a prompt of {TOKENS} tokens, one stage loaded at a time where not "
        f"all fit, with {RESERVED >> 20} MiB kept for the driver and the desktop. Measured: this run's peak, all "
        "loaded. For the cpu executor a card stands for a machine with that much memory free."
    )
    return (Text(explained), Table(header, lines))


def _method(rows: Sequence[Row]) -> list[str]:
    lines = [
        "Every case ran in a process of its own, which drew one picture after another; the first is the cold start, "
        "from the process's start to the picture's file. The page cache was brought into the state that is named "
        "beside it: warm (the model's files were read first), dropped, or as found.",
        "A picture's time goes from the request to the PNG on the disk. The floor is the operations of matrix "
        "products, attention and convolutions over the rate that a large matrix product reached here, in the same "
        "library and with the same threads, before the cases.",
        "The fp32 reference drew the same prompt, seed, size and steps; the gate is a PSNR that each precision must "
        "reach. A picture that is not finite, is constant or misses the gate is failed.",
    ]
    reached = [row.memory for row in rows if row.memory and row.memory.interval_median.value is not None]
    if reached:
        median = statistics.median(m.interval_median.value for m in reached if m.interval_median.value is not None)
        longest = max(m.interval_longest.value for m in reached if m.interval_longest.value is not None)
        lines.append(
            f"Memory was sampled from another process every {1e3 * reached[0].interval:.0f} ms (median reached "
            f"{1e3 * median:.1f} ms, longest gap {1e3 * longest:.0f} ms) and at the end of every stage."
        )
        reasons = dict.fromkeys(
            reason
            for m in reached
            for reason in (m.gpu_process.reason, m.gpu_device.reason, m.anonymous.reason)
            if reason
        )
        lines += [f"Not measured: {reason}." for reason in reasons]
    energies = [row for row in rows if row.energy.value is not None]
    lines += [
        f"Energy: {row.case.label} {row.case.size}: {digits(row.energy.value or 0)} J a picture." for row in energies
    ]
    lines += list(dict.fromkeys(f"{row.case.system}: {note}." for row in rows for note in row.notes))
    return lines


def _where(rows: Sequence[Row]) -> tuple[Block, ...]:
    if not rows:
        return ()
    header = ("case", "commit", "model's fingerprint", "load before", "own", "mapped", "threads", "started")
    lines = tuple(
        (
            f"{row.case.label} {row.case.size}",
            str(row.environment.get("git_commit") or "–")[:12],
            row.case.fingerprint[:12],
            _load(row),
            size_of(row.memory.anonymous) if row.memory else "–",
            size_of(row.memory.mapped) if row.memory else "–",
            str(row.case.threads),
            row.started,
        )
        for row in rows
    )
    commands = dict.fromkeys(row.command for row in rows)
    gpu = rows[0].environment.get("gpu") or {}
    devices = "; ".join(f"{name} {value}" for name, value in gpu.items() if value is not None)
    packages: dict[str, str] = {}
    for row in rows:
        packages |= {k: v for k, v in row.environment["packages"].items() if v}
    return (
        Text(f"GPU: {devices or 'unknown'}."),
        Text("Packages: " + ", ".join(f"{name} {version}" for name, version in sorted(packages.items())) + "."),
        *(Text(f"Made by: {command}") for command in commands),
        Table(header, lines),
    )


def _load(row: Row) -> str:
    value = row.conditions.get("before", {}).get("load_average")
    return f"{value:.2f}" if isinstance(value, int | float) else "–"
