"""The report's plots, as SVG. matplotlib comes with the extra `report` and is imported only here."""

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from zimage_runtime.bundle.manifest import CPU

from .cards import CARDS_GB
from .schema import DECODE, FAILED, IMPORT, LOAD, OURS, SAVE, STAGES, STEP, TEXT, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
_MARKERS = "osD^vP*X"
_STAGE_COLOURS = {
    IMPORT: "#bdbdbd",
    LOAD: "#8c8c8c",
    TEXT: "#e69f00",
    STEP: "#0072b2",
    DECODE: "#009e73",
    SAVE: "#cc79a7",
}
_GIB = 2**30
_WIDTH = 9.5  # inches
MOST_TRACES = 12
"""Cases whose memory is plotted over time: more would make a page that nobody reads."""


def plots(rows: Sequence[Row]) -> dict[str, tuple[str, bytes]]:
    """Name → what it shows, and the SVG. Rows without images and plots with nothing to show are left out."""
    shown = [row for row in rows if row.times is not None and row.memory is not None]
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(dict.fromkeys(r.case.label for r in shown))}
    found: dict[str, tuple[str, bytes]] = {}
    if not shown:
        return found
    found["latency-memory"] = ("Seconds per image against peak memory", _latency_memory(shown, colours))
    found["stages"] = ("Time of each stage of a warm image", _stages(shown))
    left_out = f"; the first {MOST_TRACES} cases" if len(shown) > MOST_TRACES else ""
    found["memory"] = (f"Memory over time, with the stages as bands{left_out}", _memory(shown[:MOST_TRACES]))
    if len({row.case.size for row in shown}) > 1:
        found["size"] = ("Seconds per image against its size", _latency_size(shown, colours))
    return found


def _figure(height: float, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _svg(figure: "Figure") -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # without a date and with fixed ids, the same rows make the same file
    with matplotlib.rc_context({"svg.hashsalt": "zimage-rt"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def total_median(row: Row) -> float:
    """Seconds of a warm image."""
    assert row.times is not None
    return statistics.median(draw.total for draw in row.times.draws)


def peak_bytes(row: Row) -> float | None:
    """What an image needs: a GPU's memory where it was generated there, else the process's own."""
    memory = row.memory
    if memory is None:
        return None
    if memory.gpu_process.value or (row.case.system == OURS and row.case.executor != CPU):
        # where NVML does not report the process's, the device's growth is the next best
        return memory.gpu_process.value or memory.gpu_device.value
    return memory.anonymous.value or memory.resident.value


def _latency_memory(rows: Sequence[Row], colours: Mapping[str, str]) -> bytes:
    figure, (axes,) = _figure(4.6)
    sizes = list(dict.fromkeys(row.case.size for row in rows))
    peaks = []
    for row in rows:
        peak, times = peak_bytes(row), row.times
        if peak is None or times is None:
            continue
        peaks.append(peak / _GIB)
        totals = [draw.total for draw in times.draws]
        middle = total_median(row)
        axes.errorbar(
            peak / _GIB,
            middle,
            yerr=[[middle - min(totals)], [max(totals) - middle]],
            fmt=_MARKERS[sizes.index(row.case.size) % len(_MARKERS)],
            color=colours[row.case.label],
            markersize=8,
            fillstyle="none" if row.status == FAILED else "full",
            capsize=3,
        )
    axes.set_xscale("log")
    _seconds_axis(axes, [total_median(row) for row in rows])
    _plain_ticks(axes.xaxis)
    left = min([*peaks, CARDS_GB[0]]) / 1.6
    axes.set_xlim(left, max([*peaks, CARDS_GB[-1]]) * 1.25)
    for card in CARDS_GB:
        axes.axvline(card, color="#9aa0a6", linewidth=1, linestyle="--", zorder=0)
        name = f"{card} GB" if card == CARDS_GB[-1] else f"{card}"
        axes.annotate(name, (card, 1), (0, 4), ("data", "axes fraction"), "offset points", ha="center", fontsize=8)
    axes.set_xlabel("peak memory, GiB")
    axes.grid(True, which="major", alpha=0.25)
    _legend(axes, colours, sizes)
    return _svg(figure)


def _legend(axes: "Axes", colours: Mapping[str, str], sizes: Sequence[str]) -> None:
    """A legend outside the axes, where it covers nothing: colours are cases, markers are sizes."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in colours.items()]
    handles += [
        Line2D([], [], color="#5f6368", marker=_MARKERS[i % len(_MARKERS)], linestyle="", label=size)
        for i, size in enumerate(sizes)
    ]
    handles.append(Line2D([], [], color="#5f6368", marker="o", fillstyle="none", linestyle="", label="failed"))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)


def _seconds_axis(axes: "Axes", values: Sequence[float]) -> None:
    """From 0, unless the values are so far apart that the small ones would all lie at 0."""
    if max(values) > 8 * min(values):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    else:
        axes.set_ylim(0, max(values) * 1.25)
    axes.set_ylabel("seconds per image")


def _plain_ticks(axis: "Axis") -> None:
    """Ticks at 1, 2, 5, 10 … where matplotlib would write powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _stages(rows: Sequence[Row]) -> bytes:
    figure, (axes,) = _figure(1.3 + 0.42 * len(rows))
    names = [f"{row.case.label} {row.case.size}{' (failed)' if row.status == FAILED else ''}" for row in rows]
    left = [0.0] * len(rows)
    for stage, label in ((TEXT, "text"), (STEP, "all steps"), (DECODE, "decode"), (SAVE, "encode and save")):
        widths = [stage_median(row, stage) or 0.0 for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=_STAGE_COLOURS[stage], label=label, height=0.65)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("seconds (median of each stage)")
    axes.grid(True, axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=4, fontsize=9, frameon=False)
    return _svg(figure)


def stage_median(row: Row, stage: str) -> float | None:
    """The median over warm images of a stage's seconds, all steps of an image together; None where not reported."""
    if row.times is None:
        return None
    values: list[float] = []
    for draw in row.times.draws:
        match stage:
            case "text" if draw.text is not None:
                values.append(draw.text)
            case "step" if draw.steps:
                values.append(sum(draw.steps))
            case "decode" if draw.decode is not None:
                values.append(draw.decode)
            case "save":
                values.append(draw.save)
    return statistics.median(values) if values else None


def _memory(rows: Sequence[Row]) -> bytes:
    from matplotlib.patches import Patch

    figure, panels = _figure(0.7 + 1.75 * len(rows), len(rows))
    for row, axes in zip(rows, panels, strict=True):
        assert row.memory is not None
        for stage, begin, end in row.memory.bands:
            axes.axvspan(begin, end, color=_STAGE_COLOURS.get(stage, "#dddddd"), alpha=0.25, linewidth=0)
        at = [point[0] for point in row.memory.trace]
        for index, label, style in ((1, "own memory", "-"), (2, "mapped files", ":"), (3, "GPU", "--")):
            series = [point[index] for point in row.memory.trace]
            if any(value is not None for value in series):
                values = [float("nan") if value is None else float(value) / _GIB for value in series]
                axes.plot(at, values, style, color="black", linewidth=1.3, label=label)
        axes.set_title(f"{row.case.label} {row.case.size}", fontsize=9, loc="left")
        axes.set_ylabel("GiB", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.tick_params(labelsize=8)
    panels[-1].set_xlabel("seconds since the process started")
    lines, labels = panels[0].get_legend_handles_labels()
    patches = [Patch(color=_STAGE_COLOURS[stage], alpha=0.4, label=stage) for stage in STAGES]
    figure.legend(
        [*lines, *patches], [*labels, *STAGES], loc="outside upper center", ncols=9, fontsize=8, frameon=False
    )
    return _svg(figure)


def _latency_size(rows: Sequence[Row], colours: Mapping[str, str]) -> bytes:
    from matplotlib.ticker import NullLocator

    figure, (axes,) = _figure(4.2)
    for label, colour in colours.items():
        ordered = sorted(
            (row.case.width * row.case.height / 1e6, total_median(row)) for row in rows if row.case.label == label
        )
        axes.plot([x for x, _ in ordered], [y for _, y in ordered], "o-", color=colour, label=label)
    sizes = sorted({(row.case.width * row.case.height / 1e6, row.case.size) for row in rows})
    axes.set_xscale("log")
    _seconds_axis(axes, [total_median(row) for row in rows])
    axes.set_xticks([pixels for pixels, _ in sizes], [size for _, size in sizes], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("size of the image, by its pixels")
    axes.grid(True, alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    return _svg(figure)
