"""The report's tables: what was measured, stage by stage, and in how much memory."""

from collections.abc import Sequence

from .accuracy import unchecked
from .blocks import Table
from .measure import median_step
from .plots import peak_bytes, stage_median
from .schema import DECODE, FAILED, SAVE, STEP, TEXT, Reading, Row
from .statistics import summarize
from .tables import digits, gibibytes, seconds, size_of


def summary_table(rows: Sequence[Row]) -> Table:
    """One row per case."""
    header = (
        "case", "size", "median image", "p90", "steps/s", "images/min", "cold start", "peak memory",
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
    """ "ok", "failed", or why the image was not checked, without the details."""
    if reason := unchecked(row):
        return f"not checked: {short(reason)}"
    return "failed" if row.status == FAILED else "ok"


def short(reason: str) -> str:
    """A reason up to its first colon: details and advice stand behind it."""
    return reason.partition(": ")[0]


def accuracy_text(row: Row) -> str:
    """PSNR, or that the images are identical."""
    accuracy = row.accuracy
    if accuracy is None or accuracy.reference is None:
        return "–"
    return "identical" if accuracy.identical else _reading(accuracy.psnr_db, "dB")


def _reading(reading: Reading, unit: str) -> str:
    return "–" if reading.value is None else f"{digits(reading.value)} {unit}".rstrip()


def stage_table(rows: Sequence[Row]) -> Table:
    """Medians and floors of each stage, and what is done once per process."""
    header = (
        "case",
        "size",
        "import",
        "load",
        "first image",
        "text",
        "step",
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


def memory_table(rows: Sequence[Row]) -> Table:
    """Peak memory of the process, of its stages, and of the plan."""
    header = (
        "case", "size", "own", "mapped", "own: text", "own: steps", "own: decode", "planned", "GPU process",
        "GPU device growth", "GPU allocator",
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
