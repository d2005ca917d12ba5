"""The committed reports of `zimage-rt bench` on this CPU, and the README's numbers from them.

    python benchmarks/bench_report.py --work DIR [--only demo] [--quick]

Two models: the demo model that ships, and a few blocks of the published width with weights of their own. Each is
exported in every precision and drawn by zimage-rt and by diffusers on the same checkpoint. With `--only full-size`,
the whole model with random weights in int8, beside stable-diffusion.cpp (which must be installed) in q8_0. Run it on
a quiet machine; interrupted, it goes on where it was. `--readme` only writes the README's block again.
"""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, cli_child, full_size_checkpoint, prepared_bundle
from cpu_step import scale

from zimage_rt.bench.measure import median_step
from zimage_rt.bench.plots import peak_bytes, total_median
from zimage_rt.bench.results import NAME, read_rows
from zimage_rt.bench.row_tables import accuracy_text
from zimage_rt.bench.schema import OK, OURS, Row
from zimage_rt.bench.tables import gibibytes, markdown_table, seconds

README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"(<!-- made by make bench-report -->\n).*?(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Subject:
    """A model and what to draw with it."""

    name: str
    title: str  # in the README
    prompt: str
    sizes: tuple[str, ...]  # empty: the bundle's own
    repeat: int
    steps: int = 8
    precisions: tuple[str, ...] = ("fp32", "bf16", "int8")
    baselines: tuple[str, ...] = ("diffusers", "diffusers-bf16", "diffusers-compiled")
    large: bool = False  # measured only when it is asked for

    @property
    def made_by(self) -> str:
        """The command that measures it."""
        return "make bench-full-size-systems" if self.large else "make bench-report"


SUBJECTS = (
    Subject("demo", "the demo model", "a red circle left of a blue square", (), 10),
    Subject(
        "blocks",
        "3 blocks of the published width",
        "a lighthouse on a cliff",
        ("128x128", "256x256"),
        repeat=3,
        steps=2,
        baselines=("diffusers", "diffusers-compiled"),  # a picture in bf16 takes minutes on a CPU without it
    ),
    Subject(
        "full-size",
        "the full-size model with random weights, one step",
        "a red fox in the snow, golden hour",
        ("256x256", "512x512"),
        repeat=1,
        steps=1,
        precisions=("int8",),
        baselines=("stable-diffusion.cpp",),
        large=True,
    ),
)


def prepare(subject: Subject, work: Path, quick: bool) -> tuple[Path, list[Path]]:
    """The subject's checkpoint and a bundle for each precision, made where they are missing."""
    from zimage_export.source.checkpoint import DEMO

    work.mkdir(parents=True, exist_ok=True)
    if quick:
        checkpoint, _ = prepared_bundle(work, "quick", scale("tiny", 3))
    elif subject.large:
        work = work / "full-size"  # which full_size.py shares
        checkpoint = full_size_checkpoint(work)
    elif subject.name == "demo":
        checkpoint = DEMO
    else:
        checkpoint, _ = prepared_bundle(work, "step-real-3", scale("real", 3))  # cpu_step has it too
    kind = "quick" if quick else "bundle" if subject.large else subject.name
    bundles = [work / f"{kind}-{precision}" for precision in subject.precisions]
    for bundle, precision in zip(bundles, subject.precisions, strict=True):
        if not bundle.exists():
            _run("zimage_export.cli", "build", str(checkpoint), str(bundle), "--precision", precision, "--quiet")
    return checkpoint, bundles


def bench(subject: Subject, work: Path, out: Path, quick: bool) -> None:
    """Runs `zimage-rt bench` into `out`, and takes away what a report does not need."""
    checkpoint, bundles = prepare(subject, work, quick)
    sizes = ("32x32",) if quick else subject.sizes
    words = ["bench", *map(str, bundles), "--checkpoint", str(checkpoint), "--prompt", subject.prompt]
    words += [word for size in sizes for word in ("--size", size)]
    words += [word for name in subject.baselines[: 1 if quick else None] for word in ("--baseline", name)]
    words += ["--repeat", "2" if quick else str(subject.repeat), "--out", str(out)]
    words += ["--steps", "1" if quick else str(subject.steps)]
    _run("zimage_rt.cli", *words, failure_allowed=True)  # a failed case is a finding, and the report says it
    shutil.rmtree(out / "logs", ignore_errors=True)


def _run(module: str, *arguments: str, failure_allowed: bool = False) -> None:
    status = subprocess.run(cli_child(module, *arguments), check=False).returncode
    if status and not (failure_allowed and status == 1):
        sys.exit(status)


def readme_block(results: Path = RESULTS) -> str:
    """The README's table, from the rows that are committed; empty where there are none."""
    parts = []
    for subject in SUBJECTS:
        file = results / f"bench-{subject.name}" / NAME
        if file.exists():
            link = f"benchmarks/results/bench-{subject.name}/report.md"
            parts += [f"On {subject.title} ([report]({link}), `{subject.made_by}`):", "", _table(read_rows(file)), ""]
    return "\n".join(parts)


def _table(rows: list[Row]) -> str:
    lines = [_line(row) for row in rows if row.times is not None]
    return markdown_table(["system", "size", "a step", "a picture", "peak of its own memory", "against fp32"], lines)


def _line(row: Row) -> list[Any]:
    name = f"zimage-rt {row.case.precision}" if row.case.system == OURS else row.case.label
    return [
        name if row.status == OK else f"{name} (failed)",
        row.case.size,
        seconds(median_step(row.times)),
        seconds(total_median(row)),
        gibibytes(peak_bytes(row)),
        accuracy_text(row),
    ]


def write_readme(results: Path = RESULTS, readme: Path = README) -> None:
    """Puts the block between its marks."""
    text = readme.read_text("utf-8")
    block = readme_block(results)
    readme.write_text(_BLOCK.sub(lambda marks: f"{marks[1]}{block}{marks[2]}", text), "utf-8")


def block_in(text: str) -> str:
    """What stands between the marks. Raises `ValueError` where there are none."""
    match = _BLOCK.search(text)
    if not match:
        raise ValueError("the README has no block that make bench-report writes")
    return match[0].removeprefix(match[1]).removesuffix(match[2])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where checkpoints and bundles are kept: 20 GB, 80 for full-size")
    parser.add_argument("--only", choices=[subject.name for subject in SUBJECTS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--readme", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny random models, to try the script; needs --out")
    options = parser.parse_args()
    if options.quick and options.out == RESULTS:
        parser.error("--quick is no measurement: give another folder with --out")
    if not options.readme and options.work is None:
        parser.error("give --work")
    for subject in SUBJECTS:
        if not options.readme and (options.only == subject.name or not (options.only or subject.large)):
            bench(subject, options.work, options.out / f"bench-{subject.name}", options.quick)
    if not options.quick:
        write_readme(options.out)


if __name__ == "__main__":
    main()
