"""Commands that are stopped: by Ctrl-C, by a signal, by a reader who has gone. Nothing half-written is left."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
from cli_tools import Capture, Outcome, assert_one_line_error, call_export, finish, start, unchanged
from facts import assert_facts
from PIL import Image

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.command_line.console import run_command
from zimage_runtime.errors import BundleError
from zimage_runtime.model.programs import Program

pytestmark = pytest.mark.deep

STOPPING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
LONG = ("--steps", 256, "--size", "512x512", "--seed", 1)


def start_run(bundle: Path, folder: Path, *options: object) -> "subprocess.Popen[str]":
    return start("zimage-rt", "run", "a lighthouse", "-m", bundle, *options, cwd=folder)


def wait_for_steps(process: "subprocess.Popen[str]") -> str:
    """Reads the progress until a step is done, and returns what was read."""
    assert process.stderr is not None
    read = ""
    while not re.search(r"\b[1-9][0-9]*/256", read):
        piece = os.read(process.stderr.fileno(), 4096).decode(errors="replace")
        assert piece, f"the command ended early: {read}"
        read += piece
    return read


def stop_at_work(bundle: Path, folder: Path, number: signal.Signals) -> Outcome:
    """Sends a signal to a command that is generating, and returns what it left."""
    process = start_run(bundle, folder, *LONG)
    read = wait_for_steps(process)
    process.send_signal(number)
    outcome = finish(process)
    return Outcome(outcome.status, outcome.out, read + outcome.err)


def with_denoiser(bundle: Path, folder: Path, side: int, products: int) -> Path:
    """A copy whose denoiser multiplies `products` square matrices of a side, one after another."""
    import onnx
    from onnx import TensorProto, helper

    copy = folder / "slow-bundle"
    shutil.copytree(bundle, copy)
    manifest = Bundle.open(copy).manifest
    record = manifest.record(Program.DENOISER, "cpu")
    assert record is not None
    path = copy / record.path
    model = onnx.load(str(path), load_external_data=False)
    number = helper.make_tensor("number", TensorProto.INT64, [2], [side, side])
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [1 / side])
    nodes = [
        helper.make_node("ReduceMax", ["latents"], ["most"], keepdims=0),  # so that nothing is known in advance
        helper.make_node("Mul", ["most", "zero"], ["none"]),
        helper.make_node("Add", ["none", "one"], ["unit"]),
        helper.make_node("Expand", ["unit", "number"], ["m0"]),  # ones, of which every product is ones
        *(
            node
            for index in range(products)
            for node in (
                helper.make_node("MatMul", [f"m{index}", f"m{index}"], [f"p{index}"]),
                helper.make_node("Mul", [f"p{index}", "scale"], [f"m{index + 1}"]),
            )
        ),
        helper.make_node("ReduceMin", [f"m{products}"], ["least"], keepdims=0),
        helper.make_node("Mul", ["least", "zero"], ["nothing"]),
        helper.make_node("Add", ["latents", "nothing"], ["velocity"]),
    ]
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    graph = helper.make_graph(nodes, "slow", model.graph.input, model.graph.output, [number, scale, zero, one])
    path.write_bytes(helper.make_model(graph, opset_imports=model.opset_import, ir_version=10).SerializeToString())
    document = json.loads((copy / "manifest.json").read_text())
    document["files"][record.path]["size"] = path.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(document))
    return copy


@pytest.mark.deep
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_a_long_step_at_its_next_operator(
    bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A step of several minutes, made of operators of about a second, ends long before its last operator."""
    slow = with_denoiser(bundle, tmp_path, 3072, 800)
    process = start_run(slow, tmp_path, "--size", "32x32", "--steps", 1)
    wait_until(process, lambda watched: watched.cpu_times().user > 4)  # which nothing before the denoiser takes
    process.send_signal(number)
    outcome = finish(process)  # which waits for two minutes
    assert outcome.status == 128 + number
    assert "Traceback" not in outcome.err
    assert sorted(os.listdir(tmp_path)) == ["slow-bundle"]


@pytest.mark.deep
def test_the_second_signal_ends_an_operator_that_does_not_stop(bundle: Path, tmp_path: Path) -> None:
    slow = with_denoiser(bundle, tmp_path, 11264, 1)
    process = start_run(slow, tmp_path, "--size", "32x32", "--steps", 1)
    wait_until(process, lambda watched: watched.memory_info().rss > 1 << 30)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=2)
    assert process.returncode == 130
    process.communicate()


def wait_until(process: "subprocess.Popen[str]", at_work: Callable[[psutil.Process], bool]) -> None:
    """Waits until the denoiser runs, as its use of time or memory shows."""
    watched = psutil.Process(process.pid)
    while not at_work(watched):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_while_generating(bundle: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        outcome = stop_at_work(bundle, tmp_path, signal.SIGINT)
    assert outcome.status == 130
    assert outcome.out == ""
    first, *after = [line for line in outcome.err.splitlines() if line.strip()]
    assert_facts(first, "CPU")
    assert any(line.startswith("generating") for line in after)
    assert "256/256" not in outcome.err
    assert [line for line in after if not line.startswith("generating")] == ["interrupted"]
    assert outcome.err.endswith("interrupted\n")


@pytest.mark.parametrize("number", STOPPING[1:])
def test_terminated_while_generating(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    with unchanged(tmp_path):
        outcome = stop_at_work(bundle, tmp_path, number)
    assert outcome.status == 128 + number
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert "256/256" not in outcome.err


def test_images_generated_before_an_interrupt_stay_whole(bundle: Path, tmp_path: Path) -> None:
    process = start_run(bundle, tmp_path, "--size", "64x64", "--steps", 8, "--seed", 1, "-n", 10_000, "--quiet")
    assert process.stdout is not None
    paths = [process.stdout.readline().strip() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.status == 130
    paths += outcome.lines
    assert sorted(os.listdir(tmp_path)) == sorted(paths)
    for path in paths:
        with Image.open(tmp_path / path) as image:
            image.load()


@pytest.mark.parametrize("number", STOPPING)
def test_stopped_while_building(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start("zimage-export", "build", checkpoint, tmp_path / "bundle", "--quiet")
    while not os.listdir(tmp_path):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    outcome = finish(process)
    assert "Traceback" not in outcome.err
    if outcome.status == 0:  # it was faster than the signal
        Bundle.open(tmp_path / "bundle").verify()
    else:
        assert outcome.status == 128 + number
        assert os.listdir(tmp_path) == []


def test_killed_while_building(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    """Killed twenty times at random moments, from the first byte to the replacement of an older bundle."""
    target = tmp_path / "bundle"
    moments = random.Random(0)
    cut_short = 0
    for _ in range(20):
        process = start("zimage-export", "build", checkpoint, target, "--force", "--quiet")
        before = set(os.listdir(tmp_path))
        while not set(os.listdir(tmp_path)) - before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        process.communicate()
        cut_short += process.returncode == -signal.SIGKILL
        if target.exists():  # a whole bundle, of this build or of one before
            Bundle.open(target).verify()
        for name in set(os.listdir(tmp_path)) - {"bundle"}:
            with pytest.raises(BundleError):
                Bundle.open(tmp_path / name)
    assert cut_short >= 10, "most builds were done before they were killed"
    outcome = call_export(capsys, "build", checkpoint, target, "--force", "--quiet")
    assert outcome.status == 0, outcome.err
    Bundle.open(target).verify()
    assert os.listdir(tmp_path) == ["bundle"]


def test_bundle_set_aside_by_a_killed_build_is_not_left(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f".bundle.{gone.pid}-0123abcd.old").mkdir()
    outcome = call_export(capsys, "build", checkpoint, tmp_path / "bundle", "--quiet")
    assert outcome.status == 0, outcome.err
    assert os.listdir(tmp_path) == ["bundle"]


def test_leftovers_of_a_build_that_still_runs_are_spared(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / f".bundle.{os.getpid()}-0123abcd.part").mkdir()
    assert call_export(capsys, "build", checkpoint, tmp_path / "bundle", "--quiet").status == 0
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("options", [(), ("--json",), ("-n", 3)])
def test_reader_of_stdout_has_gone(bundle: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    reader, writer = os.pipe()
    process = start(
        *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "64x64", "--steps", 1, "--quiet", *options),
        cwd=tmp_path,
        stdout=writer,
    )
    os.close(writer)
    os.close(reader)
    outcome = finish(process)
    assert outcome.err == ""
    assert outcome.status == 1
    assert len(os.listdir(tmp_path)) == 1  # what was generated before anyone knew
    assert not os.listdir(tmp_path)[0].startswith(".")


@pytest.mark.parametrize("stream", [1, 2])
def test_closed_stream(bundle: Path, tmp_path: Path, stream: int) -> None:
    process = start(
        *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "64x64", "--steps", 1, "--seed", 3),
        cwd=tmp_path,
        preexec_fn=lambda: os.close(stream),
    )
    outcome = finish(process)
    assert outcome.status == 0
    assert "Traceback" not in outcome.err
    assert outcome.out == ("" if stream == 1 else "zimage-3.png\n")
    assert os.listdir(tmp_path) == ["zimage-3.png"]


def test_error_with_stderr_closed_stays_off_stdout(tmp_path: Path) -> None:
    process = start("zimage-rt", "run", "a fox", "-m", tmp_path / "nowhere", preexec_fn=lambda: os.close(2))
    assert finish(process) == Outcome(1, "", "")


@pytest.mark.parametrize("gone", [False, True])
def test_an_image_is_worth_more_than_its_progress(bundle: Path, tmp_path: Path, gone: bool) -> None:
    """stderr is on a disk that is full, or its reader has gone."""
    reader, writer = os.pipe() if gone else (os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY))
    process = start(
        *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "64x64", "--steps", 1, "--seed", 3),
        cwd=tmp_path,
        stderr=writer,
    )
    os.close(writer)
    os.close(reader)
    assert finish(process) == Outcome(0, "zimage-3.png\n", "")
    assert os.listdir(tmp_path) == ["zimage-3.png"]


def test_ctrl_c_before_a_command_begins_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes as soon as the first handler is set, while the second one is not."""
    setter = signal.signal

    def interrupted(number: int, handler: Any) -> Any:
        before = setter(number, handler)
        if number == signal.SIGINT and callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)
        return before

    restored = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background job it is ignored
    monkeypatch.setattr(signal, "signal", interrupted)
    try:
        assert run_command(click.Command("nothing"), []) == 130
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C reached the interpreter")
    finally:
        setter(signal.SIGINT, restored)
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_in_the_import_of_a_native_module_is_no_traceback(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module's initialization fails for the handler's exception, and the import raises one of its own."""

    def command() -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ImportError("initialization failed") from None

    restored = signal.signal(number, signal.SIG_DFL)  # in a shell's background job it is ignored
    try:
        assert run_command(click.Command("import", callback=command), []) == 128 + number
    finally:
        signal.signal(number, restored)
    assert capsys.readouterr().err == "interrupted\n"


def test_stdout_on_a_full_disk(bundle: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(
            *("zimage-rt", "run", "a fox", "-m", bundle, "--size", "64x64", "--steps", 1, "--quiet"),
            cwd=tmp_path,
            stdout=full,
        )
        outcome = finish(process)
    assert_one_line_error(outcome, "space")
