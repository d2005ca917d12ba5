"""The committed reports of `zimage-rt bench` on this CPU, and the documentation's tables from them.

    python benchmarks/bench_report.py --work DIR [--only demo] [--trial]

The demo model that ships, and a few blocks of the published width with weights of their own: each is exported in
every precision, and generates with zimage-rt and with diffusers on the same checkpoint. With `--only openvino`, the
demo model beside OpenVINO GenAI; with `--only full-size`, the whole model with random weights in int8, beside
stable-diffusion.cpp in q8_0 (both systems must be installed). Run it on a quiet machine; interrupted, it continues
where it stopped. `--tables` only writes the tables again, between the marks of the README or of a page in docs.
"""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_rt.bench.children import cli_child
from zimage_rt.bench.measure import median_step
from zimage_rt.bench.plots import peak_bytes, total_median
from zimage_rt.bench.results import NAME, read_rows
from zimage_rt.bench.row_tables import accuracy_text
from zimage_rt.bench.schema import OK, OURS, Row
from zimage_rt.bench.script import RESULTS
from zimage_rt.bench.synthetic import built, few_blocks, full_size_checkpoint, prepared
from zimage_rt.bench.tables import gibibytes, markdown_table, seconds

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"(<!-- made by make bench-report -->\n).*?(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Subject:
    """A model, and what is generated with it."""

    name: str
    title: str  # above its table
    prompt: str
    sizes: tuple[str, ...]  # empty: the bundle's own
    repeat: int
    steps: int = 8
    precisions: tuple[str, ...] = ("fp32", "bf16", "int8")
    baselines: tuple[str, ...] = ("diffusers", "diffusers-bf16", "diffusers-compiled")
    command: str = "make bench-report"

    @property
    def asked_for(self) -> bool:
        """Whether it is measured only when it is named: it takes long, or needs what is not in the extras."""
        return self.command != Subject.command


SUBJECTS = (
    Subject("demo", "the demo model", "a red circle left of a blue square", (), 10),
    Subject(
        "blocks",
        "3 blocks of the published width",
        "a lighthouse on a cliff",
        ("128x128", "256x256"),
        repeat=3,
        steps=2,
        baselines=("diffusers", "diffusers-compiled"),  # an image in bf16 takes minutes on a CPU without it
    ),
    Subject(
        "openvino",
        "the demo model, beside OpenVINO GenAI",
        "a red circle left of a blue square",
        (),
        repeat=10,
        precisions=("fp32", "int8"),
        baselines=("diffusers", "openvino-genai", "openvino-genai-int8"),
        command="make bench-openvino",
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
        command="make bench-full-size-systems",
    ),
)


def prepare(subject: Subject, work: Path, trial: bool) -> tuple[str, list[Path]]:
    """The subject's checkpoint and a bundle for each precision, made where they are missing."""
    from zimage_export.synthetic.checkpoint import SMALL

    checkpoint, name = "tiny", "trial" if trial else subject.name
    if trial:
        checkpoint = str(prepared(work, name, SMALL)[0])
    elif subject.name == "full-size":  # which full_size.py shares
        work, name = work / "full-size", "bundle"
        checkpoint = str(full_size_checkpoint(work))
    elif subject.name == "blocks":  # which cpu_step.py shares
        checkpoint = str(prepared(work, "step-3", few_blocks(3, text_layers=3))[0])
    return checkpoint, [built(checkpoint, work / f"{name}-{precision}", precision) for precision in subject.precisions]


def bench(subject: Subject, work: Path, out: Path, trial: bool) -> None:
    """Runs `zimage-rt bench` into `out`, and removes what a report does not need."""
    checkpoint, bundles = prepare(subject, work, trial)
    words = ["bench", *map(str, bundles), "--checkpoint", checkpoint, "--prompt", subject.prompt, "--out", str(out)]
    words += [word for size in (("32x32",) if trial else subject.sizes) for word in ("--size", size)]
    words += [word for name in subject.baselines[: 1 if trial else None] for word in ("--baseline", name)]
    words += ["--repeat", "2" if trial else str(subject.repeat), "--steps", "1" if trial else str(subject.steps)]
    status = subprocess.run(cli_child("zimage_rt.cli", *words), check=False).returncode
    if status not in (0, 1):  # a failed case is a finding, and the report says it
        sys.exit(status)
    shutil.rmtree(out / "logs", ignore_errors=True)


def tables(results: Path = RESULTS, up: str = "") -> str:
    """The tables, from the rows that are committed; empty where there are none. `up` leads to the repository's root."""
    parts = []
    for subject in SUBJECTS:
        file = results / f"bench-{subject.name}" / NAME
        if file.exists():
            link = f"{up}benchmarks/results/bench-{subject.name}/report.md"
            parts += [f"On {subject.title} ([report]({link}), `{subject.command}`):", "", _table(read_rows(file)), ""]
    return "\n".join(parts)


def _table(rows: list[Row]) -> str:
    lines = [_line(row) for row in rows if row.times is not None]
    return markdown_table(["system", "size", "a step", "an image", "peak of its own memory", "against fp32"], lines)


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


def marked_pages(root: Path = ROOT) -> list[Path]:
    """The README and the pages of docs that have the marks, which stand for where the tables go."""
    return [
        page for page in (root / "README.md", *(root / "docs").glob("*.md")) if _BLOCK.search(page.read_text("utf-8"))
    ]


def filled(page: Path, results: Path = RESULTS, root: Path = ROOT) -> str:
    """A page's text with the tables between its marks."""
    block = tables(results, "../" * len(page.relative_to(root).parent.parts))
    return _BLOCK.sub(lambda marks: f"{marks[1]}{block}{marks[2]}", page.read_text("utf-8"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where checkpoints and bundles are kept: 20 GB, 80 for full-size")
    parser.add_argument("--only", choices=[subject.name for subject in SUBJECTS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--trial", action="store_true", help="tiny random models, to try the script; needs --out")
    options = parser.parse_args()
    if options.trial and options.out == RESULTS:
        parser.error("--trial is no measurement: give another folder with --out")
    if not options.tables and options.work is None:
        parser.error("give --work")
    for subject in SUBJECTS:
        if not options.tables and (options.only == subject.name or not (options.only or subject.asked_for)):
            bench(subject, options.work, options.out / f"bench-{subject.name}", options.trial)
    if not options.trial:
        for page in marked_pages():
            page.write_text(filled(page, options.out), "utf-8")


if __name__ == "__main__":
    main()
