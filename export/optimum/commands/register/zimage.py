"""`optimum-cli export zimage`: `zimage-export build` for users of Hugging Face's tools.

optimum imports every file of the namespace package `optimum.commands.register` when it starts and registers what
`REGISTER_COMMANDS` lists. No folder here may have an `__init__.py`: it would hide optimum's own modules.

The options are read from `zimage-export build`, and arguments are passed on to it unchanged, so the two commands cannot
diverge: argparse only has to know which options have a value.
"""

import sys
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class ExportZImageCommand(BaseOptimumCLICommand):
    """`optimum-cli export zimage --model MODEL OUT …`."""

    COMMAND = CommandInfo(name="zimage", help="Export a Z-Image checkpoint to a bundle that zimage-rt generates from.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds `--model` and OUT, which `zimage-export build` takes as arguments, and its options."""
        from zimage_export.cli import build

        parser.description = build.help
        parser.add_argument("-m", "--model", required=True, help="Directory of the checkpoint, in diffusers layout.")
        parser.add_argument("out", metavar="OUT", help="Directory of the bundle to write.")
        for parameter in build.params:
            if isinstance(parameter, click.Option):
                _add_option(parser, parameter)

    def run(self) -> None:
        """Runs `zimage-export build` and exits with its status."""
        from zimage_export.cli import build
        from zimage_runtime.command_line.console import run_command

        assert self.args is not None  # optimum runs only what it has parsed
        # the groups give messages the name under which the command was called
        root = click.Group("optimum-cli", commands={"export": click.Group("export", commands={"zimage": build})})
        options = getattr(self.args, _COLLECTED, [])
        sys.exit(run_command(root, ["export", "zimage", *options, "--", self.args.model, self.args.out]))


_COLLECTED = "zimage_options"


class _Collect(Action):
    """Collects an option, unchanged, to be passed on."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        collected: Sequence[str] = getattr(namespace, _COLLECTED, ())
        name = self.option_strings[0]  # `option_string` may be an abbreviation
        setattr(namespace, _COLLECTED, [*collected, name, *([] if self.nargs == 0 else [values])])


def _add_option(parser: ArgumentParser, option: click.Option) -> None:
    takes_value = not (option.is_flag or option.count)
    metavar = None
    if takes_value:
        choices = getattr(option.type, "choices", None)
        metavar = option.metavar or ("{" + ",".join(choices) + "}" if choices else option.type.name.upper())
    text = option.help or ""
    if option.show_default and option.default is not None:
        text += f"  [default: {option.default}]"
    for names in (option.opts, option.secondary_opts):
        if names:
            parser.add_argument(
                *sorted(names, key=len, reverse=True),
                action=_Collect,
                nargs=None if takes_value else 0,
                default=SUPPRESS,
                dest=_COLLECTED,
                metavar=metavar,
                help=text.replace("%", "%%"),
            )


REGISTER_COMMANDS = [(ExportZImageCommand, ExportCommand)]
