"""The `zimage-export` command."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from zimage_runtime.console import run_command
from zimage_runtime.manifest import Precision
from zimage_runtime.progress import Progress


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="zimage-rt", prog_name="zimage-export")
def cli() -> None:
    """Export a Z-Image checkpoint to a bundle that zimage-rt draws from."""


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice([p.value for p in Precision]),
    default=Precision.FP32.value,
    show_default=True,
    help="How weights are stored and computed with.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is already at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the path.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def build(model: str, out: Path, precision: str, force: bool, as_json: bool, quiet: bool) -> None:
    """Export the checkpoint in directory MODEL (diffusers layout) to a bundle at OUT."""
    from .build import BuildOptions
    from .build import build as build_bundle

    bundle = build_bundle(model, out, BuildOptions(Precision(precision), force), Progress(quiet))
    manifest = bundle.manifest
    _report(
        {
            "path": str(out),
            "precision": manifest.precision.value,
            "bytes": bundle.size,
            "fingerprint": manifest.fingerprint,
            "self_check": dict(manifest.self_check),
        },
        as_json,
        str(out),
    )


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random weights.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A tokenizer.json to use instead of the small one that knows bytes only.",
)
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def synthesize(out: Path, seed: int, tokenizer: Path | None, quiet: bool) -> None:
    """Write a small checkpoint of random weights to OUT, in the published layout, to try the tools on."""
    from .synthetic import SMALL, write_checkpoint

    write_checkpoint(out, SMALL, seed=seed, tokenizer=tokenizer, progress=Progress(quiet))
    click.echo(str(out))


def _report(document: dict[str, Any], as_json: bool, line: str) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False) if as_json else line)


def main() -> None:
    """The console script."""
    sys.exit(run_command(cli))
