"""The README's examples do what they say: its marked blocks are run as they stand, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest

import zimage_export.cli
import zimage_rt.cli
from zimage_runtime.command_line.console import run_command

pytestmark = pytest.mark.deep

README = Path(__file__).parents[1] / "README.md"
COMMANDS = {"zimage-export": zimage_export.cli.cli, "zimage-rt": zimage_rt.cli.cli}


def marked_block(language: str) -> str:
    match = re.search(
        rf"<!-- the test suite runs these lines -->\n```{language}\n(.*?)```", README.read_text("utf-8"), re.S
    )
    assert match, f"no marked {language} block in the README"
    return match[1]


@pytest.mark.usefixtures("diffusers_pipeline")  # for its one thread: verifying is much slower with two
def test_commands_and_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line.removeprefix("$ ").split("  #")[0] for line in marked_block("console").splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line)
        assert run_command(COMMANDS[program], arguments) == 0, line
    assert (tmp_path / "cat.png").stat().st_size > 1000
    exec(compile(marked_block("python"), "README.md", "exec"), {})
    assert {path.name for path in tmp_path.glob("fox-*.png")} == {"fox-7.png", "fox-8.png"}


def test_every_option_that_the_readme_names_exists() -> None:
    known = {
        option
        for group in COMMANDS.values()
        for command in group.commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    # pip's -c and -e, and pytest's -m, are not ours
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README.read_text("utf-8")))
    assert named - known == set()


def test_every_file_that_the_readme_links_to_exists() -> None:
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text("utf-8"))
    assert len(linked) > 5
    assert [path for path in linked if not (README.parent / path).exists()] == []
