"""What commands that generate have in common: which executor runs them, and how much memory it may use."""

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import click

from zimage_runtime.command_line.console import MemoryType
from zimage_runtime.executors.registry import AUTO, EXECUTORS

Command = TypeVar("Command", bound=Callable[..., Any])

NAMES = ("executor", "device", "vram", "low_memory", "trust_engines")
"""Of the parameters, in the order of `--help`."""

_OPTIONS = (
    click.option("--executor", type=click.Choice([AUTO, *EXECUTORS]), default=AUTO, show_default=True),
    click.option(
        "--device", type=click.IntRange(0), default=0, show_default=True, help="Which GPU, where there are several."
    ),
    click.option("--vram", type=MemoryType(), help="GPU memory to use at most, like 8GiB.  [default: what is free]"),
    click.option("--low-memory", is_flag=True, help="Keep weights on disk, mapped: slower, far less memory."),
    click.option(
        "--trust-engines",
        is_flag=True,
        help="Load TensorRT engines that came with the bundle. They are code: only for a bundle from someone you "
        "trust.",
    ),
)


def execution_options(command: Command) -> Command:
    """Adds the options to a command."""
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), command)
