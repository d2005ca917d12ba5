"""The report of `gpu.py` as a page: what was measured, what failed and why, and what is not installed."""

from collections.abc import Iterator, Sequence
from typing import Any

from zimage_rt.bench.tables import Column, column_table, markdown_table, mib

TOLERANCE = 0.1  # between the plan and NVML's peak

Child = dict[str, Any]


def page(document: Child) -> list[str]:
    """Everything that was measured."""
    gpu, rows = document["gpu"], document["rows"]
    about = [f"Random weights, scale {document['scale']}, {document['steps']} steps."]
    if gpu:
        major, minor = gpu["capability"]
        driver = f"driver {gpu['driver']}, CUDA {gpu['cuda']}"
        about.insert(0, f"{gpu['name']}, compute capability {major}.{minor}, {mib(gpu['total'])} MiB, {driver}.")
    if document["trial"]:
        about.append("A trial on the CPU: its times and its memory mean nothing.")
    absent = [f"- {name} cannot run here: {reason}" for name, reason in document["executors"].items() if reason]
    parts = ["The executors on a GPU", " ".join(about), "\n".join(absent)]
    for title, kinds, columns, note in TABLES:
        found = [line for row in rows if row["kind"] in kinds and "failed" not in row["result"] for line in lines(row)]
        if found:
            parts += [f"## {title}", column_table(columns, found), note]
    failed = [
        (named(row), row["kind"], row["result"]["failed"].replace("|", "/"))
        for row in rows
        if "failed" in row["result"]
    ]
    if failed:
        parts += ["## Failed, or refused", markdown_table(["what", "measurement", "reason"], failed)]
    return parts


def named(row: Child) -> str:
    """A measurement, with its size."""
    width, height = row["size"]
    return f"{row['executor']} {row['name']}, {width}x{height}"


def lines(row: Child) -> Iterator[Child]:
    """The lines of a table that a measurement gives: its result, or one for each program, variant or part."""
    result, about = row["result"], {"name": row["name"], "own": f"{row['executor']} {row['name']}", "named": named(row)}
    if row["kind"] == "placement":
        yield from ({**about, "program": program, **found} for program, found in result.items())
    elif row["kind"] == "steps":
        for variant, seconds in result["seconds"].items():
            faster = result["ours_faster"].get(variant)
            yield {**about, **result, "variant": variant, "seconds": seconds, "faster": faster}
    elif row["kind"] in ("layouts", "attention", "copies"):
        for part, ways in result["rows"].items():
            yield from ({**about, "part": part, "way": way, "ms": 1e3 * seconds} for way, seconds in ways.items())
    else:
        yield {**about, **result}


def placed(row: Child) -> str:
    """Whether the nodes ran where they should."""
    return "as it should be" if row["as_it_should_be"] else f"**elsewhere: {', '.join(row['elsewhere'])}**"


def off(row: Child) -> str:
    """The plan against what was held."""
    held, planned = row["process_bytes"], row["planned_bytes"]
    text = "" if held is None else f"{(planned - held) / held:+.1%}"
    return f"**{text}**" if held is not None and abs(planned - held) > TOLERANCE * held else text


def mebibytes(key: str) -> Column:
    """A column of bytes."""
    return lambda row: "unknown" if row[key] is None else mib(row[key])


def faster(row: Child) -> str:
    """How many times faster ours is than a variant."""
    found = row["faster"]
    return "" if found is None else "{median:.2f} ({least:.2f} to {most:.2f})".format(**found)


TABLES: Sequence[tuple[str, Sequence[str], dict[str, Column], str]] = (
    (
        "Where the nodes ran",
        ("placement",),
        {
            "program": "{name} {program}",
            "nodes": "{nodes}",
            "on the device": "{on_device}",
            "copies": "{copies}",
            "verdict": placed,
        },
        "",
    ),
    (
        "Against the CPU executor",
        ("parity",),
        {
            "reduced model": "{own}",
            "latents, relative error": "{latents_error:.2g}",
            "image, dB": lambda row: "equal" if row["psnr"] is None else f"{row['psnr']:.1f}",
        },
        "",
    ),
    (
        "Many images in a row",
        ("cycle",),
        {
            "images in a row": "{own}",
            "images": "{images}",
            "each size gives the same": lambda row: "yes" if row["equal"] else "**NO**",
            "growth, MiB": mebibytes("growth_bytes"),
        },
        "",
    ),
    (
        "Images: memory, time, energy",
        ("pictures", "provider"),
        {
            "image": "{named}",
            "first": "{first_seconds:.3f}",
            "later": "{seconds:.3f}",
            "prompt": "{caption_seconds:.3f}",
            "step": "{step_seconds:.3f}",
            "decode": "{decode_seconds:.3f}",
            "joules": "{joules:.0f}",
            "held MiB": lambda row: mib(row["process_bytes"] or row["device_bytes"]),
            "planned": mebibytes("planned_bytes"),
            "off": off,
            "notes": lambda row: "; ".join(row["notices"]),
        },
        "Seconds. Held is NVML's peak of the process, or what the device gained where NVML lists no process.",
    ),
    (
        "One step beside diffusers'",
        ("steps",),
        {
            "step": "{named}: {variant}",
            "seconds": "{seconds:.4f}",
            "TFLOP/s of matrices": "{tera_operations_a_second:.1f}",
            "over floor": lambda row: f"{row['over_floor'][row['variant']]:.2f}",
            "ours faster": faster,
            "left out": lambda row: row.get("without", "").replace("|", "/"),
        },
        "The floor is a step's operations at the card's measured matrix rate.",
    ),
    (
        "Starts",
        ("start",),
        {
            "start": "{named}",
            "interpreter": "{process_seconds:.2f}",
            "to open": "{open_seconds:.2f}",
            "first image": "{first_image_seconds:.2f}",
            "cached afterwards, MB": lambda row: (
                "" if row["cached_bytes"] is None else f"{row['cached_bytes'] / 1e6:.1f}"
            ),
        },
        "",
    ),
    (
        "Parts of a step",
        ("layouts", "attention", "copies"),
        {"part": "{name}: {part}", "way": "{way}", "milliseconds": "{ms:.3f}"},
        "",
    ),
    (
        "TensorRT's settings",
        ("tensorrt",),
        {
            "setting": "{named}",
            "first image": "{first_seconds:.3f}",
            "step": "{step_seconds:.3f}",
            "scratch asked for, MiB": mebibytes("scratch_bytes"),
            "planned in all": mebibytes("planned_bytes"),
            "times asked": "{contexts}",
        },
        "",
    ),
)
