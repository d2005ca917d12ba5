"""The full-size model on an ordinary machine: made, exported, checked, and one picture drawn, with each one's memory.

    python benchmarks/full_size.py --work DIR [--precision bf16] [--scale full] [--size 256x256] [--limit 8]

Each phase is a process of its own, watched from outside. The checkpoint is made of random weights in the published
shapes and types (33 GB; the bf16 bundle takes 21 GB more) and is kept in DIR for the next run. The time that
streaming takes is held against a plain read of the same shards and a plain write of as many bytes as the bundle has.
With `--limit`, the picture is drawn in a control group that has no more memory than that, page cache included.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Peak,
    cli_child,
    describe,
    machine,
    markdown_table,
    measure_child,
    synthesize_words,
    write_results,
)
from memory_limit import Limit, memory_limit

_PIECE = 16 << 20
_PACKAGES = ("onnxruntime", "onnx", "numpy")


def main() -> None:
    """Runs all phases and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint and the bundle are put")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--scale", default="full", choices=["full", "small"])
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--steps", default="8")
    parser.add_argument("--limit", type=float, help="GB of memory that drawing may use")
    parser.add_argument("--draw-only", action="store_true", help="a picture, from the bundle that an earlier run made")
    parser.add_argument("--export-only", action="store_true", help="neither check hashes nor draw a picture")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--copy", type=Path, nargs=2, metavar=("CHECKPOINT", "BUNDLE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.copy:
        plain_copy(*options.copy)
        return
    picture = None if options.export_only else Picture(options.size, options.steps, options.limit)
    if picture and options.draw_only:
        report = draw(options.work, options.precision, picture)
        write_results(f"full_size_{options.precision}_picture", report, to_markdown(report), options.out)
        print(to_markdown(report))
        return
    report = measure(options.work, options.precision, options.scale, picture)
    write_results(f"full_size_{options.precision}", report, to_markdown(report), options.out)
    print(to_markdown(report))


@dataclass(frozen=True)
class Picture:
    """What is drawn, and the GB that it may take."""

    size: str
    steps: str
    limit: float | None = None


def measure(work: Path, precision: str, scale: str, picture: Picture | None) -> dict[str, Any]:
    """Every phase's seconds, memory and bytes."""
    checkpoint, bundle = work / "checkpoint", work / f"bundle-{precision}"
    work.mkdir(parents=True, exist_ok=True)
    phases: dict[str, dict[str, Any]] = {}
    if not checkpoint.exists():
        phases["synthesize"] = _phase("zimage_export.cli", *synthesize_words(checkpoint, scale))[0]
    _forget_cached_files()
    phases["export"], text = _phase(
        "zimage_export.cli", "build", str(checkpoint), str(bundle), "--precision", precision, "--force", "--json"
    )
    export = json.loads(text)
    _forget_cached_files()
    phases["plain read and write"] = _plain_copy_phase(work, checkpoint, bundle)
    if picture:
        phases["verify hashes"] = _phase("zimage_rt.cli", "info", str(bundle), "--verify")[0]
        _forget_cached_files()
        phases["picture"] = _picture_phase(bundle, work / "picture.png", picture)
    return _described(bundle, precision, picture, phases) | {
        "scale": scale,
        "checkpoint_bytes": _folder_bytes(checkpoint),
        "export_seconds": export["seconds"],
        "streaming_over_plain_copy": round(export["seconds"]["weights"] / phases["plain read and write"]["seconds"], 2),
    }


def draw(work: Path, precision: str, picture: Picture) -> dict[str, Any]:
    """A picture's seconds and memory, and nothing else."""
    bundle = work / f"bundle-{precision}"
    _forget_cached_files()
    return _described(bundle, precision, picture, {"picture": _picture_phase(bundle, work / "picture.png", picture)})


def _described(
    bundle: Path, precision: str, picture: Picture | None, phases: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "machine": machine(*_PACKAGES),
        "precision": precision,
        "picture": {"size": picture.size, "steps": int(picture.steps), "limit_gb": picture.limit} if picture else None,
        "bundle_bytes": _folder_bytes(bundle),
        "weights_bytes": {str(f.relative_to(bundle)): f.stat().st_size for f in sorted(bundle.rglob("*.safetensors"))},
        "phases": phases,
    }


def _picture_phase(bundle: Path, out: Path, picture: Picture) -> dict[str, Any]:
    words = ["run", "a red fox in the snow", "-m", str(bundle), "--size", picture.size, "--steps", picture.steps]
    words += ["--seed", "7", "--low-memory", "-o", str(out), "--json"]
    if picture.limit is None:
        return _phase("zimage_rt.cli", *words)[0]
    with memory_limit(round(picture.limit * 1e9)) as limit:
        row = _phase("zimage_rt.cli", *words, limit=limit)[0]
    return row | {"group": limit.usage}


def _plain_copy_phase(work: Path, checkpoint: Path, bundle: Path) -> dict[str, Any]:
    print(f"{time.strftime('%H:%M:%S')} plain read and write", file=sys.stderr, flush=True)
    copy = [sys.executable, __file__, "--work", str(work), "--copy", str(checkpoint), str(bundle)]
    return _row(measure_child(copy)[0])


def _phase(module: str, *arguments: str, limit: Limit | None = None) -> tuple[dict[str, Any], str]:
    print(f"{time.strftime('%H:%M:%S')} {' '.join(arguments[:2])}", file=sys.stderr, flush=True)
    command = cli_child(module, *arguments, *([] if "info" in arguments else ["--quiet"]))
    peak, text = measure_child(limit.command(command) if limit else command)
    return _row(peak), text


def _row(peak: Peak) -> dict[str, Any]:
    return {
        "seconds": round(peak.seconds, 1),
        "anonymous_bytes": peak.anonymous,
        "mapped_bytes": peak.file,
        "resident_bytes": peak.resident,
        "read_bytes": peak.read,
        "written_bytes": peak.written,
    }


def plain_copy(checkpoint: Path, bundle: Path) -> None:
    """Reads every shard and writes as many bytes as the bundle's weights take, and does nothing else."""
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(_PIECE):
                pass
    scratch = bundle.with_suffix(".scratch")
    scratch.mkdir(exist_ok=True)
    zeros = memoryview(bytearray(_PIECE))
    try:
        for number, path in enumerate(sorted(bundle.rglob("*.safetensors"))):
            left = path.stat().st_size
            with (scratch / str(number)).open("wb", buffering=0) as file:
                while left:
                    left -= file.write(zeros[: min(left, _PIECE)])
    finally:
        shutil.rmtree(scratch)


def _forget_cached_files() -> None:
    """Lets the kernel drop the page cache, where it may be told to, so that every phase reads from the disk."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("the page cache could not be dropped: reads may come from memory", file=sys.stderr)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [
        [name, row["seconds"], *(f"{row[key] / 1e9:.2f}" for key in _COLUMNS)] for name, row in report["phases"].items()
    ]
    weights = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in report.get("weights_bytes", {}).items())
    parts = [
        f"# Full size: {report['precision']}",
        f"{_origin(report)}a bundle of {report['bundle_bytes'] / 1e9:.1f} GB{_drawn(report)}. Sizes in GB (10⁹); "
        "seconds are of a machine that other work may share.",
        f"Weights: {weights}.",
        markdown_table(["phase", "seconds", *_COLUMNS.values()], rows),
    ]
    if export := report.get("export_seconds"):
        parts.append(
            f"The export spent {export['graphs']} s on graphs and {export['weights']} s on streaming and hashing, "
            f"which is {report['streaming_over_plain_copy']} times a plain read and write of the same bytes."
        )
    return "\n\n".join([*parts, f"Machine: {describe(report['machine'])}.", f"Made by `{_command(report)}`."])


def _origin(report: dict[str, Any]) -> str:
    if "checkpoint_bytes" not in report:
        return "Random weights of the published shapes in "
    return (
        f"A {report['scale']}-scale checkpoint of random weights, {report['checkpoint_bytes'] / 1e9:.1f} GB "
        "(transformer float32, the rest bf16) → "
    )


def _drawn(report: dict[str, Any]) -> str:
    if (picture := report["picture"]) is None:
        return ""
    drawn = f"; one picture of {picture['size']}, {picture['steps']} steps, `--low-memory`, on the CPU"
    if (limit := picture.get("limit_gb")) is None:
        return drawn
    most = report["phases"]["picture"]["group"].get("peak_bytes", 0) / 1e9
    return (
        f"{drawn}, in a control group of {limit:g} GB that counts heap, mapped files and page cache alike "
        f"(its peak: {most:.2f} GB)"
    )


def _command(report: dict[str, Any]) -> str:
    words = f"python benchmarks/full_size.py --work DIR --precision {report['precision']}"
    if (picture := report["picture"]) is None:
        return f"{words} --export-only"
    words += "" if "checkpoint_bytes" in report else " --draw-only"
    words += f" --size {picture['size']} --steps {picture['steps']}"
    return words if picture.get("limit_gb") is None else f"{words} --limit {picture['limit_gb']:g}"


_COLUMNS = {
    "anonymous_bytes": "peak anonymous",
    "mapped_bytes": "peak mapped",
    "resident_bytes": "peak resident",
    "read_bytes": "read",
    "written_bytes": "written",
}

if __name__ == "__main__":
    main()
