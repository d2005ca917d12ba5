"""Running a command so that every error is one line on stderr and an exit status, never a traceback."""

import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..errors import DeviceLostError, ZImageRuntimeError
from .progress import printable

FAILURE = 1
INTERRUPTED = 128 + signal.SIGINT

_STOPPING = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    _STOPPING.append(signal.SIGHUP)  # of a terminal that is closed

_MAX_LINE = 1000  # characters of an error: a message may quote a file's contents


def run_command(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Runs a click command and returns its exit status: 0, 1 for a failure, 2 for usage.

    Ctrl-C, SIGTERM and SIGHUP stop what runs at the next operator, clean up and give 130, 143 and 129; a second signal
    ends the process at once.
    """
    _prepare_streams()
    stopped: list[int] = []
    try:
        with _signals(stopped):
            status = _status(command, arguments)
            return 128 + stopped[0] if stopped and status == FAILURE else status
    except KeyboardInterrupt:  # it came while the handlers were set or taken back
        _say("interrupted")
        return INTERRUPTED
    except Exception:
        if not stopped:
            raise
        _say("interrupted")  # in the import of a native module, which then raises an exception of its own
        return 128 + stopped[0]


def _status(command: click.Command, arguments: Sequence[str] | None) -> int:
    try:
        result = command.main(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text, and older versions lack it
            error.show()
        else:
            _say(_usage_line(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    except DeviceLostError as error:
        _say(str(error))
        _leave_at_once()
    except ZImageRuntimeError as error:
        _say(str(error))
    except BrokenPipeError:
        _discard_stdout()  # the reader of our output has closed it
    except MemoryError:
        _say("out of memory; try a smaller --size, --low-memory, or close other programs")
    except OSError as error:
        _say(_os_error_line(error))
        _settle_stdout()
    return FAILURE


@contextlib.contextmanager
def _signals(stopped: list[int]) -> Iterator[None]:
    """Handles Ctrl-C, SIGTERM and SIGHUP while a command runs. The number of the one that came is in `stopped`.

    The first signal unwinds the stack, so that files are removed and devices freed. A second one ends the process
    without waiting for that, except SIGHUP: when a terminal is closed, both the system and the shell may send it.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stopped and sys.platform != "win32" and number == signal.SIGHUP:
            return
        if stopped:
            os._exit(128 + number)
        stopped.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {}
    for number in _STOPPING:
        # a shell's background job ignores Ctrl-C and a program under nohup SIGHUP; only the main thread sets handlers
        if signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_streams() -> None:
    """Opens streams that the caller closed, to nowhere, and lets stdout print any file name."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # lives as long as the process
        elif name == "stdout" and isinstance(stream, io.TextIOWrapper):
            # a name that is not valid UTF-8 is printed as the bytes that were given
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")


def _say(text: str) -> None:
    line = " ".join(text.split())
    if len(line) > _MAX_LINE:
        line = f"{line[:_MAX_LINE]} …"
    line = printable(line)
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


def _settle_stdout() -> None:
    """Drops what stdout could not write; otherwise the interpreter would report it again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _discard_stdout()


def _leave_at_once() -> None:
    """Ends the process without the clean-up of its libraries, which may wait for a device that is gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(FAILURE)


def _discard_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's own flush at exit cannot fail."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(nothing)


_MEMORY = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(|[KMGT]i?)B?", re.IGNORECASE)
_UNITS = " KMGT"
_SIZE = re.compile(r"(-?\d+)[xX×](-?\d+)")
_VARIATION = re.compile(r"(\d{1,20}):(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})", re.ASCII)
_LAYERS = re.compile(r"\d{1,4}(,\d{1,4}){0,99}", re.ASCII)


if TYPE_CHECKING:
    _SizeParam = click.ParamType[tuple[int, int]]
    _MemoryParam = click.ParamType[int]
    _VariationParam = click.ParamType[tuple[int, float]]
    _LayersParam = click.ParamType[tuple[int, ...]]
else:  # generic since click 8.4 only
    _SizeParam = _MemoryParam = _VariationParam = _LayersParam = click.ParamType


class SizeType(_SizeParam):
    """WIDTHxHEIGHT in pixels."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parses the text. The pipeline checks whether the model can generate that size."""
        match = _SIZE.fullmatch(value)
        if not match or len(value) > 40:
            self.fail(f"{value[:40]!r} is not a size; write it like 1024x768", param, ctx)
        return int(match[1]), int(match[2])


class VariationType(_VariationParam):
    """SEED:STRENGTH: another seed, and its share of the noise."""

    name = "SEED:STRENGTH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """Parses the text; the request checks the values."""
        match = _VARIATION.fullmatch(value)
        if not match:
            self.fail(f"{value[:40]!r} is no variation; write it like 5:0.2", param, ctx)
        return int(match[1]), float(match[2])


class LayersType(_LayersParam):
    """Numbers of layers: 0,2,4."""

    name = "LAYERS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parses the text; what the numbers may be depends on the model."""
        if not _LAYERS.fullmatch(value):
            self.fail(f"{value[:40]!r} is no list of layers; write it like 0,2,4", param, ctx)
        return tuple(int(number) for number in value.split(","))


class MemoryType(_MemoryParam):
    """An amount of memory, in bytes: 8GiB, 8G and 8192M are the same; 8GB is 8 * 10**9."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parses the text. A number without a unit is refused: it would mean bytes, which nobody intends."""
        match = _MEMORY.fullmatch(value)
        if not match or not match[2] or not float(match[1]):
            self.fail(f"{value[:40]!r} is not an amount of memory; write it like 8GiB", param, ctx)
        unit = match[2].upper()
        decimal = value.upper().endswith("B") and not unit.endswith("I")
        # rounded up, so that the amount reads back as it was written
        step: int = (1000 if decimal else 1024) ** _UNITS.index(unit[0])
        return math.ceil(float(match[1]) * step)
