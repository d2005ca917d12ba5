"""Running a command so that whatever goes wrong is one line on stderr and an exit status, never a traceback."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from .errors import ZImageRuntimeError

FAILURE = 1
INTERRUPTED = 128 + signal.SIGINT


def run_command(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Runs a click command and returns its exit status: 0, 1 for a failure, 2 for usage, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = command.main(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        _say(_usage_line(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    except ZImageRuntimeError as error:
        _say(str(error))
    except BrokenPipeError:
        _discard_stdout()  # whoever read our output has seen enough
    except MemoryError:
        _say("out of memory; try a smaller --size, --low-memory, or close other programs")
    except OSError as error:
        _say(_os_error_line(error))
    return FAILURE


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack, so that temporary files are removed."""
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    line = " ".join(text.split())
    with contextlib.suppress(OSError):  # where stderr is closed too, the exit status remains
        print(f"error: {line}" if line != "interrupted" else line, file=sys.stderr, flush=True)


def _usage_line(error: click.ClickException) -> str:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if isinstance(error, click.UsageError) and context is not None:
        return f"{message} (see '{context.command_path} --help')"
    return message


def _os_error_line(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}no space left to write; free some or choose another place"
    return f"{where}{error.strerror or error}"


def _discard_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's own flush at exit cannot fail."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(nothing)
