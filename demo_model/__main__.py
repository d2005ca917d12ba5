"""``python -m demo_model WORK``: trains the demo model, or goes on training it."""

from pathlib import Path

import click

from .recipe import train_demo


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="A few steps of everything, to see that it runs.")
def main(work: Path, quick: bool) -> None:
    """Train the demo model in WORK; the result is WORK/checkpoint. Interrupted, it goes on from its last save."""
    train_demo(work, quick=quick)
    click.echo(str(work / "checkpoint"))


if __name__ == "__main__":
    main()
