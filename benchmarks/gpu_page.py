"""The report of `gpu.py` as a page: what was measured, what failed and why, what was not here."""

from collections.abc import Iterator
from typing import Any

from common import describe, markdown_table, mib

TOLERANCE = 0.1  # between the plan and NVML's peak

Child = dict[str, Any]


def page(document: Child) -> str:
    """Everything that was measured."""
    return "\n".join(_lines(document))


def _lines(document: Child) -> Iterator[str]:
    gpu = document["gpu"]
    yield "# The executors on a GPU"
    yield ""
    yield describe(document["machine"]) + "."
    if gpu:
        major, minor = gpu["capability"]
        driver = f"driver {gpu['driver']}, CUDA {gpu['cuda']}"
        yield f"{gpu['name']}, compute capability {major}.{minor}, {mib(gpu['total'])} MiB, {driver}."
    if document["trial"]:
        yield "A trial on the CPU: its times and its memory mean nothing."
    yield f"Random weights, scale {document['scale']}, {document['steps']} steps. Made by `python benchmarks/gpu.py`."
    absent = {name: reason for name, reason in document["executors"].items() if reason}
    if absent:
        yield from ("", *(f"- {name} is not here: {reason}" for name, reason in absent.items()))
    for title, kinds, table in _TABLES:
        rows = [row for row in document["rows"] if row["kind"] in kinds and "failed" not in row["result"]]
        if rows:
            yield from ("", f"## {title}", "", table(rows))
    failed = [row for row in document["rows"] if "failed" in row["result"]]
    if failed:
        cells = [(_name(row), row["kind"], row["result"]["failed"].replace("|", "/")) for row in failed]
        yield from ("", "## Failed, or refused", "", markdown_table(["what", "measurement", "reason"], cells))


def _name(row: Child) -> str:
    width, height = row["size"]
    return f"{row['executor']} {row['name']}, {width}x{height}"


def _placement(rows: list[Child]) -> str:
    cells = [
        (
            f"{row['name']} {program}",
            found["nodes"],
            found["on_device"],
            found["copies"],
            "as it should be" if found["as_it_should_be"] else f"**elsewhere: {', '.join(found['elsewhere'])}**",
        )
        for row in rows
        for program, found in row["result"].items()
    ]
    return markdown_table(["program", "nodes", "on the device", "copies", "verdict"], cells)


def _parity(rows: list[Child]) -> str:
    cells = []
    for row in rows:
        psnr = row["result"]["psnr"]
        picture = "equal" if psnr is None else f"{psnr:.1f}"
        cells.append((f"{row['executor']} {row['name']}", f"{row['result']['latents_error']:.2g}", picture))
    return markdown_table(["reduced model", "latents, relative error", "image, dB"], cells)


def _cycle(rows: list[Child]) -> str:
    cells = []
    for row in rows:
        found = row["result"]
        growth = "unknown" if found["growth_bytes"] is None else mib(found["growth_bytes"])
        cells.append(
            (f"{row['executor']} {row['name']}", found["images"], "yes" if found["equal"] else "**NO**", growth)
        )
    return markdown_table(["images in a row", "images", "each size gives the same", "growth, MiB"], cells)


def _pictures(rows: list[Child]) -> str:
    cells = []
    for row in rows:
        found = row["result"]
        process, planned = found["process_bytes"], found["planned_bytes"]
        off = "" if process is None else f"{(planned - process) / process:+.1%}"
        wrong = process is not None and abs(planned - process) > TOLERANCE * process
        joules = found["joules"]
        cells.append(
            (
                _name(row),
                *(f"{found[key]:.3f}" for key in ("first_seconds", "seconds", "caption_seconds", "step_seconds")),
                f"{found['decode_seconds']:.3f}",
                "unknown" if joules is None else f"{joules:.0f}",
                mib(found["device_bytes"]) if process is None else mib(process),
                mib(planned),
                f"**{off}**" if wrong else off,
                "; ".join(found["notices"]),
            )
        )
    head = ["image", "first", "later", "prompt", "step", "decode", "joules", "held MiB", "planned", "off", "notes"]
    note = "Seconds. Held is NVML's peak of the process, or what the device gained where NVML lists no process."
    return f"{markdown_table(head, cells)}\n\n{note}"


def _steps(rows: list[Child]) -> str:
    cells = []
    for row in rows:
        found = row["result"]
        for variant, seconds in found["seconds"].items():
            faster = found["ours_faster"].get(variant)
            cells.append(
                (
                    f"{_name(row)}: {variant}",
                    f"{seconds:.4f}",
                    f"{found['tera_operations_a_second']:.1f}",
                    f"{found['over_floor'][variant]:.2f}",
                    "" if faster is None else f"{faster['median']:.2f} ({faster['least']:.2f} to {faster['most']:.2f})",
                    found.get("without", "").replace("|", "/"),
                )
            )
    head = ["step", "seconds", "TFLOP/s of matrices", "over floor", "ours faster", "left out"]
    return f"{markdown_table(head, cells)}\n\nThe floor is a step's operations at the card's measured matrix rate."


def _starts(rows: list[Child]) -> str:
    cells = []
    for row in rows:
        found = row["result"]
        cached = "" if found["cached_bytes"] is None else f"{found['cached_bytes'] / 1e6:.1f}"
        seconds = (f"{found[key]:.2f}" for key in ("process_seconds", "open_seconds", "first_image_seconds"))
        cells.append((_name(row), *seconds, cached))
    return markdown_table(["start", "interpreter", "to open", "first image", "cached afterwards, MB"], cells)


def _parts(rows: list[Child]) -> str:
    cells = []
    for row in rows:
        for what, seconds in row["result"]["rows"].items():
            cells += [(f"{row['name']}: {what}", name, f"{1e3 * value:.3f}") for name, value in seconds.items()]
    return markdown_table(["part", "way", "milliseconds"], cells)


def _settings(rows: list[Child]) -> str:
    cells = []
    for row in rows:
        found = row["result"]
        scratch = "unknown" if found["scratch_bytes"] is None else mib(found["scratch_bytes"])
        seconds = (f"{found[key]:.3f}" for key in ("first_seconds", "step_seconds"))
        cells.append((_name(row), *seconds, scratch, mib(found["planned_bytes"]), found["contexts"]))
    head = ["setting", "first image", "step", "scratch asked for, MiB", "planned in all", "times asked"]
    return markdown_table(head, cells)


_TABLES = (
    ("Where the nodes ran", ("placement",), _placement),
    ("Against the CPU executor", ("parity",), _parity),
    ("Many images in a row", ("cycle",), _cycle),
    ("Images: memory, time, energy", ("pictures", "provider"), _pictures),
    ("One step beside diffusers'", ("steps",), _steps),
    ("Starts", ("start",), _starts),
    ("Parts of a step", ("layouts", "attention", "copies"), _parts),
    ("TensorRT's settings", ("tensorrt",), _settings),
)
