"""The GPU benchmark's results as a page."""

from collections.abc import Iterator
from typing import Any

from common import describe, markdown_table, mib

_TARGET_FLOOR, _TARGET_COMPILED = 1.25, 1.15


def report(document: dict[str, Any]) -> str:
    """Everything that was measured; what failed, with its reason; what was left out."""
    return "\n".join(_lines(document))


def _lines(document: dict[str, Any]) -> Iterator[str]:
    gpu = document["gpu"]
    yield "# The CUDA executor"
    yield ""
    yield describe(document["machine"]) + "."
    if gpu:
        major, minor = gpu["capability"]
        yield f"{gpu['name']}, compute capability {major}.{minor}, {mib(gpu['total'])} MiB, CUDA {gpu['cuda']}."
    else:
        yield "A trial without a GPU: the programs for CUDA on the CPU, whose times mean nothing."
    yield f"Random weights, scale {document['scale']}, {document['steps']} steps; the median of each, in seconds."
    if not document["diffusers"]:
        yield "diffusers is not installed, or was left out: its columns are missing."
    yield "Made by `python benchmarks/gpu_cuda.py`."
    yield from _section("One step, and the floor that the measured matrix rate sets", _steps(document))
    yield from _section("Pictures", _pictures(document))
    yield from _section("The CUDA executor against the CPU executor, reduced model", _parity(document))
    yield from _section("Where the nodes ran, reduced model", _placement(document))
    missing = [(_name(row), row["without"].replace("|", "/")) for row in document["one_step"] if row.get("without")]
    if missing:
        yield from _section("Left out", markdown_table(["beside", "reason"], missing))
    failed = [row for row in [*document["pictures"], *document["one_step"]] if "failed" in row]
    if failed:
        rows = [(_name(row), row["failed"].replace("|", "/")) for row in failed]
        yield from _section("Failed", markdown_table(["what", "reason"], rows))


def _section(title: str, text: str) -> Iterator[str]:
    yield from ("", f"## {title}", "", text)


def _name(row: dict[str, Any]) -> str:
    return f"{row['precision']} {row['size'][0]}x{row['size'][1]}"


def _steps(document: dict[str, Any]) -> str:
    rows = []
    for row in document["one_step"]:
        if "failed" in row:
            continue
        for variant, seconds in row["seconds"].items():
            faster = row["ours_faster"].get(variant)
            backend = f" ({row['backend']})" if variant != "ours" else ""
            rows.append(
                (
                    f"{_name(row)} {variant}{backend}",
                    f"{seconds:.4f}",
                    f"{row['tera_operations_a_second']:.1f}",
                    f"{row['floor_seconds']:.4f}",
                    f"{row['over_floor'][variant]:.2f}",
                    "" if faster is None else f"{faster['median']:.2f} ({faster['least']:.2f} to {faster['most']:.2f})",
                )
            )
    table = markdown_table(["step", "seconds", "TFLOP/s of matrices", "floor", "over floor", "ours faster"], rows)
    return f"{table}\n\nTarget: at 1024x1024 within {_TARGET_FLOOR} of the floor, {_TARGET_COMPILED} times compiled."


def _pictures(document: dict[str, Any]) -> str:
    rows = []
    for row in document["pictures"]:
        if "failed" in row:
            continue
        process = row["process_bytes"]
        rows.append(
            (
                _name(row),
                *(f"{row[key]:.3f}" for key in ("first_seconds", "seconds", "caption_seconds", "step_seconds")),
                f"{row['decode_seconds']:.3f}",
                mib(row["device_bytes"]),
                "unknown" if process is None else mib(process),
                mib(row["planned_bytes"]),
                "; ".join(row["notices"]) or ("all stay loaded" if row["keep_all"] else "one stage at a time"),
            )
        )
    header = ["picture", "first", "later", "caption", "step", "decode", "VRAM device", "process", "planned", "plan"]
    return markdown_table(header, rows) + "\n\nVRAM in MiB: what the device gained, and what the process held."


def _parity(document: dict[str, Any]) -> str:
    rows = []
    for precision, found in document["parity"].items():
        if "failed" in found:
            rows.append((precision, found["failed"].replace("|", "/"), ""))
        else:
            psnr = "equal" if found["psnr"] is None else f"{found['psnr']:.1f}"
            rows.append((precision, f"{found['latents_error']:.2g}", psnr))
    return markdown_table(["precision", "latents, relative error", "picture, dB"], rows)


def _placement(document: dict[str, Any]) -> str:
    rows = []
    for precision, programs in document["placement"].items():
        if "failed" in programs:
            rows.append((precision, programs["failed"].replace("|", "/"), "", "", ""))
            continue
        for program, found in programs.items():
            verdict = (
                "as it should be" if found["as_it_should_be"] else f"**elsewhere: {', '.join(found['elsewhere'])}**"
            )
            rows.append((f"{precision} {program}", found["nodes"], found["on_device"], found["copies"], verdict))
    return markdown_table(["program", "nodes", "on the device", "copies", "verdict"], rows)
