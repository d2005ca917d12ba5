"""`optimum-cli export zimage`: listed, the same options and the same bundle as `zimage-export build`."""

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import click
import pytest
from facts import assert_facts

from zimage_export.cli import build
from zimage_runtime.bundle.bundle import Bundle


def optimum_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `optimum-cli` as its console script does."""
    code = "import sys; sys.argv[0] = 'optimum-cli'; from optimum.commands.optimum_cli import main; main()"
    if "PYTHONPATH" in os.environ:  # a working tree that is not the one installed: optimum must not find both
        code = f"import sys; sys.path = [path for path in sys.path if '__editable__' not in path]; {code}"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_optimum_lists_the_command() -> None:
    result = optimum_cli("export", "--help")
    assert result.returncode == 0
    assert "zimage" in result.stdout
    assert "Z-Image" in result.stdout


def test_every_option_of_build_is_offered() -> None:
    from optimum.commands.register.zimage import ExportZImageCommand

    parser = ArgumentParser()
    ExportZImageCommand.parse_args(parser)
    offered = {name for action in parser._actions for name in action.option_strings}
    options = [parameter for parameter in build.params if isinstance(parameter, click.Option)]
    assert offered == {"-h", "--help", "-m", "--model"}.union(*(option.opts for option in options))
    text = "".join(parser.format_help().split())  # argparse breaks lines at hyphens too
    assert all(option.help and "".join(option.help.split()) in text for option in options)
    arguments = [parameter.name for parameter in build.params if isinstance(parameter, click.Argument)]
    assert arguments == ["model", "out"], "the command hands these two on, in this order"


def test_registering_loads_nothing_heavy() -> None:
    code = (
        "import sys; from argparse import ArgumentParser; from optimum.commands.register.zimage import *;"
        "REGISTER_COMMANDS[0][0].parse_args(ArgumentParser());"
        "print(sorted({'torch', 'numpy', 'onnx', 'transformers', 'diffusers', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.deep
def test_the_bundle_is_the_one_that_build_writes(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = optimum_cli("export", "zimage", "--model", checkpoint, out, "--precision=fp32", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{out}\n", "")
    assert Bundle.open(out).manifest.fingerprint == Bundle.open(bundle).manifest.fingerprint


@pytest.mark.parametrize(
    ("options", "status", "facts"),
    [
        (["--model", "absent", "out"], 1, ["absent", "directory"]),
        (["--model", "absent", "out", "--precision", "fp1"], 2, ["'fp1'", "'optimum-cli export zimage --help'"]),
    ],
)
def test_errors_are_one_line(options: list[str], status: int, facts: list[str], tmp_path: Path) -> None:
    options[options.index("out")] = str(tmp_path / "out")
    result = optimum_cli("export", "zimage", *options)
    assert result.returncode == status
    assert result.stdout == ""
    assert_facts(result.stderr.strip(), "error:", *facts)
    assert not list(tmp_path.iterdir())


def test_a_model_is_required(tmp_path: Path) -> None:
    result = optimum_cli("export", "zimage", tmp_path / "out")
    assert result.returncode == 2
    assert "--model" in result.stderr
    assert "Traceback" not in result.stderr
