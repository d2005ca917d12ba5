"""`run --executor` and `--vram`: what is said on stderr, and how a lost GPU ends the command."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_tools import Capture, assert_one_line_error, call, call_rt, unchanged
from facts import assert_facts
from gpu_stand_in import Card, install_gpus, remove_driver

from zimage_runtime.command_line.console import MemoryType
from zimage_runtime.executors.ort.cuda_package import SWAP_TO_GPU

TINY = ("--size", "32x32", "--steps", 1, "--seed", 1)


@pytest.fixture(autouse=True)
def _no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_driver(monkeypatch)
    monkeypatch.chdir(tmp_path)


def test_auto_says_which_and_why(bundle: Path, capsys: Capture) -> None:
    outcome = call_rt(capsys, "run", "a fox", "-m", bundle, *TINY)
    assert outcome.lines == ["zimage-1.png"]
    (note,) = [line for line in outcome.err.splitlines() if "NVIDIA" in line]
    assert_facts(note, "CPU", "no NVIDIA driver", "no other GPU")
    asked = call_rt(capsys, "run", "a fox", "-m", bundle, *TINY, "--executor", "cpu")
    assert "CPU" not in asked.err
    assert call_rt(capsys, "run", "a fox", "-m", bundle, *TINY, "--quiet").err == ""


def test_cuda_without_a_gpu_is_one_line(bundle: Path, capsys: Capture) -> None:
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", "a fox", "-m", bundle, *TINY, "--executor", "cuda")
    assert_one_line_error(outcome, "'cuda'", "no NVIDIA driver", "`zimage-rt doctor`", "--executor cpu")


def test_cuda_without_its_package_names_the_two_commands(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpus(monkeypatch, Card())
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", "a fox", "-m", bundle, *TINY, "--executor", "cuda")
    assert_one_line_error(outcome, *(f"`{command}`" for command in SWAP_TO_GPU))


def test_a_gpu_that_is_not_used_is_said_even_when_quiet(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpus(monkeypatch, Card())
    outcome = call_rt(capsys, "run", "a fox", "-m", bundle, *TINY, "--quiet")
    assert outcome.lines == ["zimage-1.png"]
    assert_facts(outcome.err.strip(), "CPU", *(f"`{command}`" for command in SWAP_TO_GPU))


def test_a_prompt_that_is_cut_is_said_even_when_quiet(bundle: Path, capsys: Capture) -> None:
    outcome = call_rt(capsys, "run", "fox " * 200, "-m", bundle, *TINY, "--quiet")
    assert outcome.lines == ["zimage-1.png"]
    from zimage_runtime.model.tokenizer import PromptTokenizer

    cut = PromptTokenizer(bundle / "tokenizer.json").encode_counted("fox " * 200)[1]
    assert_facts(outcome.err.strip(), "prompt", f"{cut} tokens")


def test_vram_on_the_cpu(bundle: Path, capsys: Capture) -> None:
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", "a fox", "-m", bundle, *TINY, "--vram", "8GiB", "--quiet")
    assert_one_line_error(outcome, "vram", "cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8g", 8 << 30),
        ("7.5GiB", 15 << 29),
        ("6500M", 6500 << 20),
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("1TiB", 1 << 40),
        ("512KiB", 512 << 10),
    ],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert MemoryType().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["8", "", "GiB", "-8GiB", "0GiB", "8GiBs", "8e9", "8,5G", "1" * 40 + "G", "nanG"])
def test_what_is_no_amount_of_memory(bundle: Path, capsys: Capture, text: str) -> None:
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", "a fox", "-m", bundle, *TINY, "--vram", text)
    assert_one_line_error(outcome, "8GiB", status=2)


LOST = """
import atexit, sys, time
import click
from zimage_runtime.command_line.console import run_command
from zimage_runtime.errors import DeviceLostError

@click.command()
def lost():
    click.echo("written before")
    atexit.register(time.sleep, 600)  # as a library's clean-up that waits for the device
    raise DeviceLostError("the GPU was lost")

sys.exit(run_command(lost, []))
"""


def test_a_lost_gpu_ends_the_process_whatever_its_libraries_wait_for() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == "written before\n"
    assert done.stderr == "error: the GPU was lost\n"


def test_other_failures_of_an_executor_end_it_as_usual(capsys: Capture) -> None:
    from zimage_runtime.errors import ExecutorError

    @click.command()
    def failing() -> None:
        raise ExecutorError("out of memory")

    assert_one_line_error(call(capsys, failing), "out of memory")
