"""The frame of a script in `benchmarks`: it states its measurements and its page, and everything else is here.

    def measure(run: Run) -> Document:        # the cases: what was measured, in JSON's types
        ...
    def page(document: Document) -> list[str]:        # a title, then paragraphs and tables in Markdown
        ...
    SCRIPT = Script(__file__, __doc__, measure, page, work="3 GB", packages=("numpy", "onnxruntime"))
    if __name__ == "__main__":
        SCRIPT.main()

Options that scripts share are asked for by name: ``work`` (``--work DIR``, with the disk that it takes), ``rounds``
(``--rounds``) and ``sizes`` (``--size WxH ...``) with their defaults, ``cpu_time`` (``--cpu-time``), ``trial``
(``--trial``: small models, to try the script; its results are not written among the committed ones). `options` adds a
script's own, and `children` what it measures in processes of their own. Every script has ``--name`` and ``--out`` for
its two files, NAME.json and NAME.md, and ``--page``, which measures nothing and makes the Markdown again from the JSON.
The document gets the machine and the command (without this machine's paths); the page ends with both.

Around it: `timing` (calls in turns, ratios), `children` (processes of their own, peaks of memory), `synthetic`
(checkpoints and bundles of random weights), `steps` (single steps of ours and of diffusers), `tables`.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .children import Measures, answer_as_child
from .environment import describe, machine
from .timing import Clock

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
"""The committed results, in the repository."""

Document = dict[str, Any]
"""Results, in JSON's types."""

_NOT_SHOWN = ("work", "out", "page", "trial", "child")
"""Options that do not change what is measured."""


@dataclass(frozen=True)
class Option:
    """One option of a script. Its type is its default's; a list takes several words, False is a flag."""

    default: Any
    help: str
    choices: Sequence[str] = ()
    kind: Callable[[str], Any] | None = None  # where the default does not show the type

    def add(self, parser: argparse.ArgumentParser, name: str) -> None:
        """Adds it to a command line."""
        flag, help_text = f"--{name.replace('_', '-')}", self.help
        if self.default is False:
            parser.add_argument(flag, action="store_true", help=help_text)
            return
        several = isinstance(self.default, list)
        one = self.default[0] if several and self.default else self.default
        more: dict[str, Any] = {"nargs": "*"} if several else {}
        more |= {"choices": list(self.choices)} if self.choices else {}
        parser.add_argument(
            flag, type=self.kind or (str if one is None else type(one)), default=self.default, help=help_text, **more
        )


@dataclass
class Run:
    """One run of a script: what the command line asks for, and the results so far."""

    script: "Script"
    options: argparse.Namespace
    document: Document = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Where checkpoints and bundles are kept."""
        folder: Path = self.options.work
        return folder

    @property
    def trial(self) -> bool:
        """Whether this only shows that the script runs."""
        return bool(self.options.trial)

    @property
    def rounds(self) -> int:
        """How often variants take turns."""
        return int(self.options.rounds)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of the images."""
        return [size_of(text) for text in self.options.size]

    @property
    def clock(self) -> Clock:
        """The clock's seconds, or with ``--cpu-time`` the processor's."""
        return time.process_time if self.options.cpu_time else time.perf_counter

    def note(self, *words: object) -> None:
        """Progress, on stderr."""
        print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)

    def keep(self, **values: Any) -> None:
        """Adds to the document and writes it, so that an interrupt costs only what comes after."""
        self.document |= values
        if not self.trial or self.options.out != RESULTS:
            self.script.write(self.options.name, self.document, self.options.out)

    def once(self, path: Path, measure: Callable[[], Any]) -> Any:
        """What `measure` gave, in an earlier run or now; kept as JSON in `path`."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measure()))
        return json.loads(path.read_text())


@dataclass(frozen=True)
class Script:
    """A benchmark: its cases, its page, and the options that it takes."""

    file: str
    doc: str | None
    measure: Callable[[Run], Document]
    page: Callable[[Document], list[str]]
    packages: Sequence[str] = ()  # whose versions belong to the results
    work: str | None = None  # the disk that --work takes; None: the script keeps nothing
    rounds: int | None = None
    sizes: Sequence[str] = ()
    cpu_time: bool = False
    trial: bool = False
    path: str = ""  # what PYTHONPATH must contain
    options: Mapping[str, Option] = field(default_factory=dict)
    children: Measures = field(default_factory=dict)
    named: Callable[[argparse.Namespace], str] | None = None  # the results' name by what is measured

    def own_name(self, options: argparse.Namespace) -> str:
        """What the results are called unless --name says otherwise."""
        return self.named(options) if self.named else Path(self.file).stem

    def main(self, arguments: Sequence[str] | None = None) -> Document | None:
        """The command line. Prints the page and returns the document; None in a child."""
        words = list(sys.argv[1:] if arguments is None else arguments)
        if words[:1] == ["--child"]:
            answer_as_child(self.children, *words[1:])
            return None
        parser = self.parser()
        options = parser.parse_args(words)
        options.name = options.name or self.own_name(options)
        if options.page:
            document: Document = json.loads((options.out / f"{options.name}.json").read_text("utf-8"))
            self.write(options.name, document, options.out)
        else:
            if self.work and not options.work:
                parser.error("give --work")
            if options.work:
                options.work.mkdir(parents=True, exist_ok=True)
            run = Run(self, options, {"machine": machine(*self.packages), "command": self.command(options)})
            run.keep(**self.measure(run))
            document = run.document
        print(self.text(document))
        return document

    def parser(self) -> argparse.ArgumentParser:
        """The options that it shares with others, then its own."""
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        shared: dict[str, Option] = {}
        if self.work:
            shared["work"] = Option(None, f"where checkpoints and bundles are kept: {self.work}", kind=Path)
        if self.rounds is not None:
            shared["rounds"] = Option(self.rounds, "how often each variant is measured")
        if self.sizes:
            shared["size"] = Option(list(self.sizes), "of images, WIDTHxHEIGHT")
        if self.cpu_time:
            shared["cpu_time"] = Option(False, "seconds of the processor, for a busy machine")
        if self.trial:
            shared["trial"] = Option(False, "small models, to try the script: results go to another --out, or nowhere")
        ends = {
            "name": Option(None, "of the results' files, without their ends"),
            "out": Option(RESULTS, "the folder of the results", kind=Path),
            "page": Option(False, "measure nothing: make the Markdown from the JSON again"),
        }
        parser.set_defaults(work=None, trial=False)
        for name, option in (shared | dict(self.options) | ends).items():
            option.add(parser, name)
        return parser

    def command(self, options: argparse.Namespace) -> str:
        """What was run: the options that are not the defaults, and no path of this machine."""
        words = [f"PYTHONPATH={self.path}"] if self.path else []
        words += ["python", f"benchmarks/{Path(self.file).name}"] + (["--work", "DIR"] if self.work else [])
        defaults = {**vars(self.parser().parse_args([])), "name": self.own_name(options)}
        for name, value in vars(options).items():
            if name in _NOT_SHOWN or value == defaults[name]:
                continue
            flag = f"--{name.replace('_', '-')}"
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [flag, *(value.name if isinstance(value, Path) else str(value) for value in values)]
        return " ".join(f'"{word}"' if " " in word else shlex.quote(word) for word in words)

    def text(self, document: Document) -> str:
        """The page, as Markdown."""
        title, *parts = self.page(document)
        made = f"Made by `{document['command']}`." if "command" in document else ""
        return "\n\n".join(part for part in (f"# {title}", *parts, made, f"{describe(document['machine'])}.") if part)

    def write(self, name: str, document: Document, folder: Path) -> None:
        """Writes NAME.json and NAME.md."""
        write_results(name, document, self.text(document), folder)


def write_results(name: str, document: Document, markdown: str, folder: Path = RESULTS) -> None:
    """Writes `name`.json and `name`.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")


def size_of(text: str) -> tuple[int, int]:
    """A size such as 1024x768."""
    width, _, height = text.partition("x")
    return int(width), int(height)
