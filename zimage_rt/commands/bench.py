"""`zimage-rt bench`: measures speed, memory and accuracy, and compares two such results."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage_runtime.command_line.console import MemoryType, SizeType
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import RequestError

if TYPE_CHECKING:
    from ..bench.jobs import Opened, Settings

_PROMPT = "a red fox in the snow, golden hour"


@click.command(short_help="Measure speed, memory and accuracy; write a report.")
@click.argument("bundles", metavar="[BUNDLE]...", nargs=-1, type=click.Path())
@click.option("--size", "sizes", type=SizeType(), multiple=True, help="May be repeated.  [default: the bundle's own]")
@click.option("--executor", "executors", multiple=True, help="May be repeated.  [default: auto]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the bundle's own]")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Images that are measured.")
@click.option(
    "--warmup",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Images before them; the first is the cold start.",
)
@click.option("--prompt", default=_PROMPT, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=7, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("bench"),
    show_default=True,
    help="The folder of the results.",
)
@click.option("--reference", metavar="BUNDLE", help="An fp32 bundle of the same model, to compare images with.")
@click.option(
    "--checkpoint",
    metavar="MODEL",
    help="What the bundles were made from, as for zimage-export build: a directory, one file, a ComfyUI models folder, "
    "a name on the Hub, or tiny. Baselines generate from it, and diffusers in "
    "float32 is the reference.",
)
@click.option("--baseline", "baselines", multiple=True, help="Another system to measure; may be repeated, or 'all'.")
@click.option("--vram", type=MemoryType(), help="Budget of GPU memory, like 8GiB.  [default: what is free]")
@click.option("--low-memory", is_flag=True, help="Keep weights on disk, mapped.")
@click.option(
    "--drop-cache", is_flag=True, help="Drop the model's files from the page cache before each process starts."
)
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A B",
    help="Measure nothing; compare two result files, or the folders that contain them.",
)
@click.option("--report-only", is_flag=True, help="Measure nothing; write the report again from the results in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of paths or a table.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def bench(
    bundles: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    executors: tuple[str, ...],
    steps: int | None,
    repeat: int,
    warmup: int,
    prompt: str,
    seed: int,
    out: Path,
    reference: str | None,
    checkpoint: str | None,
    baselines: tuple[str, ...],
    vram: int | None,
    low_memory: bool,
    drop_cache: bool,
    compare: tuple[Path, Path] | None,
    report_only: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure every BUNDLE at every size on every executor, each combination in a fresh process.

    Needs the extra packages of pip install 'zimage-rt[report]'; --compare does not. Without a BUNDLE, the demo bundle
    that ships is measured. Writes results.jsonl, report.md and report.html to the folder --out. After an interrupt,
    run the same command again: it measures only what is missing. Images are compared with those of a float32
    reference, and a wrong image is marked failed. The exit status is 1 if a case failed. A case without a reference
    is marked not checked, which is no failure.
    """
    if compare:
        if bundles or report_only:
            raise click.UsageError("--compare takes two result files and no bundles")
        _compare(*compare, as_json)
        return
    from ..bench.checkpoints import open_checkpoint
    from ..bench.jobs import Settings, open_bundles
    from ..bench.requirements import require_extra
    from ..demo import demo_bundle

    require_extra()
    progress = Progress(quiet)
    opened = open_bundles(bundles or (str(demo_bundle()),), progress)
    settings = Settings(
        sizes=tuple(dict.fromkeys(sizes)),
        executors=executors or ("auto",),
        steps=steps,
        prompt=prompt,
        seed=seed,
        repeat=repeat,
        warmup=warmup,
        low_memory=low_memory,
        drop_cache=drop_cache,
        checkpoint=open_checkpoint(checkpoint, progress, out / "checkpoint")
        if checkpoint is not None and not report_only
        else None,
        baselines=baselines,
        reference=open_bundles([reference], progress)[0] if reference is not None else None,
        vram=vram,
    )
    failed = _measure(settings, opened, out, progress, as_json, report_only)
    if failed:
        raise RequestError(f"{failed} of the cases failed; {out / 'report.md'} gives the reasons")


def _measure(
    settings: "Settings", bundles: "list[Opened]", out: Path, progress: Progress, as_json: bool, report_only: bool
) -> int:
    from dataclasses import replace

    from zimage_runtime.checked_json import to_document
    from zimage_runtime.machine.cores import thread_count
    from zimage_runtime.machine.gpu_monitor import open_monitor

    from ..bench.jobs import plan_cases
    from ..bench.report import write_report
    from ..bench.results import NAME, read_rows
    from ..bench.run import Runner, command_line
    from ..bench.systems import BASELINES, find_system

    if report_only:
        rows = read_rows(out / NAME)
    else:
        if "all" in settings.baselines:
            config = bundles[0].bundle.manifest.config
            installed = tuple(name for name in BASELINES if find_system(name).obstacle(config) is None)
            settings = replace(settings, baselines=installed)
        cases = plan_cases(settings, bundles, thread_count())
        rows = Runner(out, bundles, open_monitor(), command_line(), progress.note, progress.warn).run(cases)
    written = write_report(out, rows, bundles)
    if as_json:
        click.echo(json.dumps({"rows": to_document(rows)}, indent=2))
    else:
        for path in (out / NAME, *written):
            click.echo(str(path))
    return sum(row.status != "ok" for row in rows)


def _compare(first: Path, second: Path, as_json: bool) -> None:
    from zimage_runtime.checked_json import to_document

    from ..bench.compare import compare_rows, comparison_table
    from ..bench.results import read_rows, results_file

    pairs = compare_rows(read_rows(results_file(first)), read_rows(results_file(second)))
    if as_json:
        click.echo(json.dumps(to_document(pairs), indent=2))
    else:
        click.echo(comparison_table(pairs, str(first), str(second)))
