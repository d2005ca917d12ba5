"""The full-size model on an ordinary machine: made, exported, checked, and one image generated, and each one's memory.

    python benchmarks/full_size.py --work DIR [--precision bf16] [--size 256x256] [--limit 8]

Each phase is a process of its own, watched from outside. The checkpoint is made of random weights in the published
shapes and types (33 GB; the bf16 bundle takes 21 GB more) and is kept in DIR for the next run. The time that
streaming takes is compared with a plain read of the same shards and a plain write of as many bytes as the bundle has.
With `--limit`, the image is generated in a control group that has no more memory than that, page cache included.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from memory_limit import Limit, memory_limit

from zimage_rt.bench.children import Answer, cli_child, measure_child, script_child
from zimage_rt.bench.script import Document, Option, Run, Script
from zimage_rt.bench.synthetic import synthesize_words
from zimage_rt.bench.tables import column_table

_PIECE = 16 << 20
_SIZES = ("anonymous", "mapped", "resident", "read", "written")


def measure(run: Run) -> Document:
    """Every phase's seconds, memory and bytes, or those that were asked for."""
    asked, phases = run.options, {}
    scale = "small" if run.trial else "full"
    checkpoint, bundle = run.work / "checkpoint", run.work / f"bundle-{asked.precision}"
    found: Document = {}
    if not asked.image_only:
        if not checkpoint.exists():
            phases["synthesize"] = phase(run, "zimage_export.cli", *synthesize_words(checkpoint, scale))[0]
        forget_cached_files(run)
        words = ["build", str(checkpoint), str(bundle), "--precision", asked.precision, "--force", "--json"]
        phases["export"], text = phase(run, "zimage_export.cli", *words)
        forget_cached_files(run)
        copy = script_child(__file__, "copy", {"checkpoint": str(checkpoint), "bundle": str(bundle)})
        phases["plain read and write"] = watched(run, copy)[0]
        seconds = json.loads(text)["seconds"]
        found |= {"scale": scale, "checkpoint_bytes": folder_bytes(checkpoint), "export_seconds": seconds}
        found["streaming_over_plain_copy"] = round(seconds["weights"] / phases["plain read and write"]["seconds"], 2)
    if not (asked.export_only or asked.image_only):
        phases["verify hashes"] = phase(run, "zimage_rt.cli", "info", str(bundle), "--verify", quiet=False)[0]
    image = None
    if not asked.export_only:
        forget_cached_files(run)
        image = {"size": asked.size[0], "steps": asked.steps, "limit_gb": asked.limit}
        phases["image"] = image_phase(run, bundle, image)
    return found | {
        "precision": asked.precision,
        "image": image,
        "bundle_bytes": folder_bytes(bundle),
        "weights_bytes": {str(f.relative_to(bundle)): f.stat().st_size for f in sorted(bundle.rglob("*.safetensors"))},
        "phases": phases,
    }


def image_phase(run: Run, bundle: Path, image: Document) -> Document:
    """One image, in a control group if there is a limit."""
    words = ["run", "a red fox in the snow", "-m", str(bundle), "--size", image["size"], "--steps", str(image["steps"])]
    words += ["--seed", "7", "--low-memory", "-o", str(run.work / "image.png"), "--json"]
    if image["limit_gb"] is None:
        return phase(run, "zimage_rt.cli", *words)[0]
    with memory_limit(round(image["limit_gb"] * 1e9)) as limit:
        row = phase(run, "zimage_rt.cli", *words, limit=limit)[0]
    return row | {"group": limit.usage}


def phase(
    run: Run, module: str, *words: str, quiet: bool = True, limit: Limit | None = None
) -> tuple[dict[str, Any], str]:
    """A command of ours."""
    command = cli_child(module, *words, *(["--quiet"] if quiet else []))
    return watched(run, limit.command(command) if limit else command)


def watched(run: Run, command: list[str]) -> tuple[dict[str, Any], str]:
    """What a command took, and what it printed."""
    run.note(*command[3:5])
    peak, text = measure_child(command)
    sizes = (peak.anonymous, peak.file, peak.resident, peak.read, peak.written)
    named = {f"{name}_bytes": size for name, size in zip(_SIZES, sizes, strict=True)}
    return {"seconds": round(peak.seconds, 1), **named}, text


def plain_copy(options: Answer) -> None:
    """Reads every shard and writes as many bytes as the bundle's weights take, and does nothing else."""
    checkpoint, bundle = Path(options["checkpoint"]), Path(options["bundle"])
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


def forget_cached_files(run: Run) -> None:
    """Drops the kernel's page cache, where that is allowed, so that every phase reads from the disk."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        run.note("the page cache could not be dropped: reads may come from memory")


def folder_bytes(folder: Path) -> int:
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def page(report: Document) -> list[str]:
    """The phases."""

    def gigabytes(key: str) -> Any:
        return lambda row: f"{row[key] / 1e9:.2f}"

    shown = {"peak anonymous": "anonymous", "peak mapped": "mapped", "peak resident": "resident"}
    shown |= {"read": "read", "written": "written"}
    columns = {"phase": "{phase}", "seconds": "{seconds}"}
    columns |= {title: gigabytes(f"{key}_bytes") for title, key in shown.items()}
    weights = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in report.get("weights_bytes", {}).items())
    export, origin = report.get("export_seconds"), "Random weights of the published shapes in "
    if "checkpoint_bytes" in report:
        origin = (
            f"A {report['scale']}-scale checkpoint of random weights, {report['checkpoint_bytes'] / 1e9:.1f} GB "
            "(transformer float32, the rest bf16) → "
        )
    return [
        f"Full size: {report['precision']}",
        f"{origin}a bundle of {report['bundle_bytes'] / 1e9:.1f} GB{image_text(report)}. Sizes in GB (10⁹); seconds "
        "are of a machine that other work may share.",
        f"Weights: {weights}." if weights else "",
        column_table(columns, [{"phase": name, **row} for name, row in report["phases"].items()]),
        f"The export spent {export['graphs']} s on graphs and {export['weights']} s on streaming and hashing, "
        f"which is {report['streaming_over_plain_copy']} times a plain read and write of the same bytes."
        if export
        else "",
    ]


def image_text(report: Document) -> str:
    """What was generated, and in how much memory."""
    if (image := report["image"]) is None:
        return ""
    text = f"; one image of {image['size']}, {image['steps']} steps, `--low-memory`, on the CPU"
    if (limit := image.get("limit_gb")) is None:
        return text
    most = report["phases"]["image"]["group"].get("peak_bytes", 0) / 1e9
    return (
        f"{text}, in a control group of {limit:g} GB that counts heap, mapped files and page cache alike "
        f"(its peak: {most:.2f} GB)"
    )


SCRIPT = Script(
    __file__,
    __doc__,
    measure,
    page,
    packages=("onnxruntime", "onnx", "numpy"),
    work="55 GB",
    sizes=("256x256",),
    trial=True,
    options={
        "precision": Option("bf16", "of the bundle"),
        "steps": Option(8, "of the image"),
        "limit": Option(None, "GB of memory that generating may use", kind=float),
        "image_only": Option(False, "an image, from the bundle that an earlier run made"),
        "export_only": Option(False, "neither check hashes nor generate an image"),
    },
    children={"copy": plain_copy},
    named=lambda options: f"full_size_{options.precision}{'_picture' if options.image_only else ''}",
)

if __name__ == "__main__":
    SCRIPT.main()
