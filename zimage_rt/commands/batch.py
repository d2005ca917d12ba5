"""`zimage-rt batch`: a file of requests goes in, an image for each row comes out."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage_runtime.command_line.option_groups import GroupedCommand
from zimage_runtime.command_line.progress import Progress

from .execution_options import NAMES as EXECUTION_NAMES
from .execution_options import execution_options

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..batch.generate import Outcome, Steps
    from ..batch.items import Item
    from ..batch.records import Record

GROUPS = {
    "Common options": ("model", "output", "fail_fast"),
    "Execution": EXECUTION_NAMES,
    "Many machines": ("ray", "workers", "cpus_per_worker"),
    "Output": ("no_metadata", "as_json", "quiet"),
}
"""Of `--help`, in order."""


@click.command(cls=GroupedCommand, groups=GROUPS, short_help="Generate an image for each row of a file.")
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option(
    "-m", "--model", type=click.Path(), help="The bundle to generate with: a directory, or its Hub id, ORG/NAME."
)
@click.option("-o", "--output", required=True, help="A folder, made where it is missing, or a URL that fsspec knows.")
@click.option("--fail-fast", is_flag=True, help="End at the first row that fails.  [default: go on with the others]")
@execution_options
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="",
    help="Generate on the Ray cluster at ADDRESS.  [default: RAY_ADDRESS, or one that is started on this machine]",
)
@click.option("--workers", type=click.IntRange(1), help="With --ray.  [default: one per GPU, or per node without]")
@click.option("--cpus-per-worker", type=click.IntRange(1), help="With --ray: generate on so many cores each.")
@click.option("--no-metadata", is_flag=True, help="Write nothing but pixels.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the paths.")
@click.option("--quiet", is_flag=True, help="No progress on stderr; warnings remain.")
def batch(
    prompts: Path,
    model: str | None,
    output: str,
    fail_fast: bool,
    executor: str,
    device: int,
    vram: int | None,
    low_memory: bool,
    trust_engines: bool,
    ray: str | None,
    workers: int | None,
    cpus_per_worker: int | None,
    no_metadata: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Generate an image for each row of PROMPTS, a JSONL, CSV, TSV or Parquet file, and print the path of each.

    Columns are id and the options of `run`, as the Python API names them: prompt, seed, size, steps, negative, image,
    mask, loras and so on. All but prompt may be left out. All rows are checked before the first image. Images are
    ID.png in the folder, which manifest.parquet lists. Stopped at any moment, the same command goes on where it was;
    rows that failed are tried again.
    """
    from zimage_runtime.bundle.bundle import Bundle
    from zimage_runtime.bundle.hub import bundle_directory
    from zimage_runtime.executors.choose import ExecutorChoice
    from zimage_runtime.pipeline import Pipeline

    from ..batch import on_ray
    from ..batch.parquet import pyarrow_parquet
    from ..batch.run import Batch, BatchOptions, checked_items, in_groups, report
    from ..demo import demo_bundle

    if ray is None and (workers is not None or cpus_per_worker is not None):
        raise click.UsageError("--workers and --cpus-per-worker are for --ray")
    if ray is not None and device:
        raise click.UsageError("--device is for one machine; with --ray, each worker has a GPU of its own")
    if not output:
        raise click.UsageError("--output is empty; give a folder")
    pyarrow_parquet()  # so that it is missing now rather than at the end
    progress = Progress(quiet)
    options = BatchOptions(prompts, output, not no_metadata, fail_fast)
    directory = bundle_directory(model, progress) if model is not None else demo_bundle()

    stdout = sys.stdout  # Ray's is another

    def written(record: "Record", where: str) -> None:
        if not as_json:
            click.echo(where, file=stdout)

    if ray is None:
        with Pipeline.from_bundle(
            directory,
            executor,
            vram,
            device=device,
            low_memory=low_memory,
            trust_engines=trust_engines,
            note=progress.note,
        ) as pipeline:
            items = checked_items(options, pipeline.prepare, progress)
            summary = Batch(options, items, progress, written).run(in_groups(pipeline, options))
    else:
        bundle = Bundle.open(directory)  # no executor: this machine may be without a GPU
        items = checked_items(options, Pipeline(bundle, ExecutorChoice(bundle)).check, progress)
        each = on_ray.WorkerOptions(
            bundle=_for_workers(model),
            executor=executor,
            output=output if "://" in output else str(Path(output).absolute()),
            metadata=options.metadata,
            vram=vram,
            low_memory=low_memory,
            trust_engines=trust_engines,
        )

        def generated(pending: "list[Item]") -> "Generator[Steps | Outcome, None, None]":
            with on_ray.Cluster(ray) as cluster:
                pool = cluster.pool(workers, cpus_per_worker)
                progress.note(f"{pool.workers} workers on Ray, each with {pool.gpus or pool.cpus} {pool.kind}")
                yield from on_ray.on_ray(pending, each, pool)

        summary = Batch(options, items, progress, written).run(generated)
    if as_json:
        click.echo(json.dumps(summary.document(), indent=2))
    report(summary, options, progress)


def _for_workers(model: str | None) -> str | None:
    """The bundle as another process, perhaps on another machine, opens it."""
    return str(Path(model).absolute()) if model is not None and Path(model).exists() else model
