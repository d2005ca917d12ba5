"""The `zimage-rt` command. Each subcommand imports what it needs when it runs, so that --help is instant."""

import sys

import click

from zimage_runtime.command_line.console import run_command

from .commands.bench import bench
from .commands.doctor import doctor
from .commands.info import info
from .commands.plan import plan
from .commands.run import run
from .commands.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="zimage-rt", prog_name="zimage-rt")
def cli() -> None:
    """Generate images with Z-Image Turbo on the GPU or CPU you already have."""


cli.add_command(run)
cli.add_command(serve)
cli.add_command(bench)
cli.add_command(info)
cli.add_command(plan)
cli.add_command(doctor)


def main() -> None:
    """The console script."""
    sys.exit(run_command(cli))
