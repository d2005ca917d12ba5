"""Running the two commands in tests, and what is asked of every failure of theirs.

`call` runs a command in this process, which is quick; `start` gives it a process of its own, for signals, pipes,
limits and arguments that are not valid text.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from facts import assert_facts

from zimage_export.cli import cli as export_cli
from zimage_rt.cli import cli as rt_cli
from zimage_runtime.command_line.console import run_command

Capture = pytest.CaptureFixture[str]

_MODULES = {"zimage-rt": "zimage_rt.cli", "zimage-export": "zimage_export.cli"}


@dataclass(frozen=True)
class Outcome:
    """What a command left for its caller."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stdout."""
        return self.out.splitlines()


def call(capture: Capture, command: click.Command, *arguments: object) -> Outcome:
    """Runs a command here, as its console script would."""
    capture.readouterr()
    status = _run(command, arguments)
    captured = capture.readouterr()
    return Outcome(status, captured.out, captured.err)


def call_redirected(command: click.Command, *arguments: object) -> Outcome:
    """The same without pytest's capture, which property-based tests cannot use."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = _run(command, arguments)
    return Outcome(status, out.getvalue(), err.getvalue())


def _run(command: click.Command, arguments: Iterable[object]) -> int:
    return run_command(command, [str(argument) for argument in arguments])


def call_rt(capture: Capture, *arguments: object) -> Outcome:
    """Runs `zimage-rt` here."""
    return call(capture, rt_cli, *arguments)


def call_export(capture: Capture, *arguments: object) -> Outcome:
    """Runs `zimage-export` here."""
    return call(capture, export_cli, *arguments)


def start(program: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Starts `zimage-rt` or `zimage-export` in a process of its own, with its output piped unless said otherwise."""
    entry = f"from {_MODULES[program]} import main; main()"
    words = [os.fsencode(argument if isinstance(argument, bytes) else str(argument)) for argument in arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace", **options}
    prepare = options.pop("preexec_fn", None)

    def heed_ctrl_c() -> None:
        # where the tests run as a shell's background job, SIGINT comes ignored and would stay so in the child
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if prepare is not None:
            prepare()

    options["preexec_fn"] = heed_ctrl_c
    return subprocess.Popen([sys.executable, "-c", entry, *words], **options)


def finish(process: "subprocess.Popen[str]", timeout: float = 120) -> Outcome:
    """Waits for a started command."""
    out, err = process.communicate(timeout=timeout)
    return Outcome(process.returncode, out or "", err or "")


def assert_one_line_error(outcome: Outcome, *named: object, status: int = 1) -> str:
    """Asserts that a command failed with one line on stderr that has every fact of `named`; returns that line."""
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.status == status, outcome
    assert outcome.out == ""
    line = outcome.err.removesuffix("\n")
    assert_facts(line, "error:", *named)
    assert line.startswith("error: ")
    return line


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder, hidden names included: inode, size and time of change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Asserts that the block adds, removes and alters nothing below a folder."""
    before = listing(folder)
    yield
    after = listing(folder)
    assert set(after) == set(before)
    # a file that came and went touches its folder's time, which is nothing left behind
    files = [name for name in before if not (folder / name).is_dir()]
    assert {name: after[name] for name in files} == {name: before[name] for name in files}
