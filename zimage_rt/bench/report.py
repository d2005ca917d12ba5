"""``report.md`` and ``report.html``, made from rows alone: the most important facts first."""

import contextlib
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from zimage_runtime.bundle.files import atomic_write
from zimage_runtime.executors.overheads import CARD

from .accuracy import unchecked
from .blocks import Block, Figure, Grid, Section, Table, Text, Tile, to_html, to_markdown
from .cards import CARDS_GB, TOKENS, card_table
from .environment import describe
from .jobs import Opened
from .plots import plots
from .row_tables import accuracy_text, memory_table, short, stage_table, summary_table
from .schema import FAILED, Row
from .tables import digits, size_of

TITLE = "zimage-rt bench"
_THUMBNAIL = 480  # pixels of the longer side, in the page

_MEMORY = (
    "Peaks. Own memory is anonymous: heap, arenas, packed weights. Mapped files are page cache, which shrinks when "
    "other processes need memory. The plan is zimage-rt's for host memory, with one stage loaded at a time; in these "
    "cases all stages stay loaded where they fit. The growth of the GPU device counts every process and cross-checks "
    "the process's own."
)


def write_report(out: Path, rows: Sequence[Row], bundles: Sequence[Opened]) -> list[Path]:
    """Writes the report as Markdown, as HTML and its plots; returns the paths of the first two."""
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
    return [Figure(f"plots/{name}.svg", alt, svg) for name, (alt, svg) in plots(rows).items()]


def make_sections(
    out: Path, rows: Sequence[Row], bundles: Sequence[Opened], figures: Sequence[Figure]
) -> list[Section]:
    """The report's sections, in order. Images are read from below `out`."""
    sections = [
        Section("Summary", (Text(_first_lines(rows)), summary_table(rows), *_failures(rows))),
        Section("Stages", (Text("Medians of warm images; the floor stands below each case."), stage_table(rows))),
    ]
    sections.append(Section("Memory", (Text(_MEMORY), memory_table(rows))))
    plotted = tuple(block for figure in figures for block in (Text(f"{figure.alt}."), figure))
    sections.append(Section("Plots", plotted or (Text("No case generated an image."),)))
    sections.append(Section("Images", (Text(_images_line(rows)), _grid(out, rows))))
    sections.append(Section("Which card can run this?", _cards(rows, bundles)))
    sections.append(Section("How it was measured", tuple(Text(line) for line in _method(rows))))
    sections.append(Section("Where", _where(rows)))
    return sections


def _first_lines(rows: Sequence[Row]) -> str:
    if not rows:
        return "No case was measured."
    failed = sum(row.status == FAILED for row in rows)
    verdicts = [_count(len(rows), "case"), f"{failed or 'none'} failed"]
    reasons = [short(reason) for row in rows if (reason := unchecked(row))]
    if reasons:
        verdicts.append(f"{_count(len(reasons), 'row')} not checked: {'; '.join(dict.fromkeys(reasons))}")
    return f"{', '.join(verdicts)}. {describe(rows[0].environment)}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _failures(rows: Sequence[Row]) -> tuple[Block, ...]:
    """What failed and what was not checked, with the whole reason."""
    failed = [f"Failed: {row.case.label} {row.case.size}: {row.failure}." for row in rows if row.failure]
    open_rows: dict[str, list[str]] = {}
    for row in rows:
        if reason := unchecked(row):
            open_rows.setdefault(reason, []).append(f"{row.case.label} {row.case.size}")
    not_checked = [f"Not checked: {', '.join(names)}: {reason}." for reason, names in open_rows.items()]
    return tuple(Text(line) for line in (*failed, *not_checked))


def _images_line(rows: Sequence[Row]) -> str:
    cases = {(row.case.prompt, row.case.seed, row.case.steps) for row in rows}
    return "; ".join(f"“{prompt}”, seed {seed}, {_count(steps, 'step')}" for prompt, seed, steps in sorted(cases)) + "."


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
        f"all fit, with {CARD.nbytes >> 20} MiB kept for the driver and the desktop. Measured: this run's peak, all "
        "loaded. For the cpu executor a card stands for a machine with that much memory free."
    )
    return (Text(explained), Table(header, lines))


def _method(rows: Sequence[Row]) -> list[str]:
    lines = [
        "Every case ran in a process of its own, which generated one image after another. The first is the cold "
        "start, from the start of the process to the image's file. The state of the page cache is named beside it: "
        "warm (the model's files were read first), dropped, or as found.",
        "An image's time runs from the request to the PNG on disk. The floor is the operations of matrix products, "
        "attention and convolutions divided by the rate that a large matrix product reached on this processor, with "
        "the same library and the same threads. A case on a GPU has no floor.",
        "The fp32 reference has the same prompt, seed, size and steps. Each precision must reach a PSNR of its own. "
        "An image that is constant or misses this gate is failed; one without a reference is not checked.",
    ]
    reached = [row.memory for row in rows if row.memory and row.memory.interval_median.value is not None]
    if reached:
        median = statistics.median(m.interval_median.value for m in reached if m.interval_median.value is not None)
        longest = max(m.interval_longest.value for m in reached if m.interval_longest.value is not None)
        lines.append(
            f"Memory was sampled by another process every {1e3 * reached[0].interval:.0f} ms (measured: median "
            f"{1e3 * median:.1f} ms, longest gap {1e3 * longest:.0f} ms) and at the end of every stage."
        )
        reasons = dict.fromkeys(
            reason
            for m in reached
            for reason in (m.gpu_process.reason, m.gpu_device.reason, m.anonymous.reason)
            if reason
        )
        lines += [f"Not measured: {reason}." for reason in reasons]
    floors: dict[str, list[str]] = {}
    for row in rows:
        if row.floor and row.floor.step.reason:
            floors.setdefault(row.floor.step.reason, []).append(f"{row.case.label} {row.case.size}")
    lines += [f"No floor: {', '.join(names)}: {reason}." for reason, names in floors.items()]
    energies = [row for row in rows if row.energy.value is not None]
    lines += [
        f"Energy: {row.case.label} {row.case.size}: {digits(row.energy.value or 0)} J per image." for row in energies
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
    none = f"none ({gpu['none']})" if "none" in gpu else ""
    devices = none or "; ".join(f"{name} {value}" for name, value in gpu.items() if value is not None)
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
