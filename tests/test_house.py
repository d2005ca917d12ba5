"""The house: which room may import which. Read from the sources with `ast`, imports inside functions included.

A room is a folder of a package, or a module that stands beside the folders. A module imports from its own room and
from rooms on lower floors; no module is on a circle of imports, not even by one that is for type checkers alone.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HOMES = {
    "zimage_export": REPOSITORY / "export",
    "zimage_runtime": REPOSITORY / "runtime",
    "zimage_rt": REPOSITORY,
    "demo_model": REPOSITORY,
}

FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {  # from the top; the rooms of one floor do not import each other
    "zimage_runtime": (
        ("pipeline",),
        ("group",),
        ("prepare", "stages"),
        ("job",),
        ("events", "sampling"),
        ("executors",),
        ("tiles", "images", "adapters"),
        ("bundle",),
        ("model",),
        ("machine", "checked_json", "mistaken_files", "command_line"),
        ("errors", "arrays", "units", "keyword_fields"),
    ),
    "zimage_export": (
        ("cli",),
        ("build", "programs", "controlnet"),
        ("measure",),
        ("engines", "synthetic"),
        ("weights",),
        ("graphs",),
        ("storage",),
        ("source",),
        ("output",),
        ("errors",),
    ),
    "zimage_rt": (("cli",), ("commands",), ("bench", "batch"), ("demo",)),
}

PACKAGES = {  # which other packages each may import
    "zimage_runtime": set(),
    "zimage_export": {"zimage_runtime"},
    "zimage_rt": {"zimage_runtime", "zimage_export"},
    "demo_model": {"zimage_runtime", "zimage_export"},
}

PROGRESS = "zimage_runtime.command_line.progress"
"""What reports progress: any room may import it; the rest of `command_line` is for commands."""

COMMANDS = ("zimage_rt.cli", "zimage_rt.commands", "zimage_export.cli")


@dataclass(frozen=True)
class Import:
    """One module imports another."""

    importer: str
    imported: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@cache
def modules() -> Mapping[str, Path]:
    """Every module of ours, by its dotted name."""
    found = {}
    for package, home in HOMES.items():
        for path in (home / package).rglob("*.py"):
            parts = path.relative_to(home).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, path in modules().items() for found in _imports_of(name, path))


def _imports_of(name: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text("utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{module}.{alias.name}" for alias in node.names]
        for target in targets:
            known = target if target in modules() else target.rpartition(".")[0]
            if known in modules() and known != name:
                yield Import(name, known, node.lineno, id(node) in inside)


def package_of(module: str) -> str:
    return module.partition(".")[0]


def room_of(module: str) -> str:
    """Empty for a package's own `__init__`."""
    return module.partition(".")[2].partition(".")[0]


def floor_of(module: str) -> int:
    floors = FLOORS[package_of(module)]
    return next(number for number, rooms in enumerate(floors) if room_of(module) in rooms)


def test_the_reader_sees_imports() -> None:
    """Absolute and relative ones, in functions, and those for type checkers alone."""
    found = {(one.importer, one.imported, one.in_function) for one in imports()}
    assert ("zimage_export.cli", "zimage_runtime.bundle.manifest", False) in found
    assert ("zimage_runtime.model.linears", "zimage_runtime.model.blocks", False) in found
    assert ("zimage_export.cli", "zimage_export.build", True) in found
    assert ("zimage_export.cli", "zimage_export.measure.verify", False) in found  # under TYPE_CHECKING


def test_every_module_has_a_room() -> None:
    on_the_map = {package: {room for rooms in floors for room in rooms} for package, floors in FLOORS.items()}
    strays = [
        name
        for name in modules()
        if package_of(name) in on_the_map and "." in name and room_of(name) not in on_the_map[package_of(name)]
    ]
    assert strays == []


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_runs_upwards(package: str) -> None:
    wrong = [
        str(one)
        for one in imports()
        if package_of(one.importer) == package_of(one.imported) == package
        and room_of(one.importer)  # the package itself offers what it has from any floor
        and one.imported != PROGRESS
        and room_of(one.importer) != room_of(one.imported)
        and not (room_of(one.imported) and floor_of(one.importer) < floor_of(one.imported))
    ]
    assert wrong == []


@pytest.mark.parametrize("package", HOMES)
def test_there_is_no_circle(package: str) -> None:
    edges: dict[str, set[str]] = {}
    for one in imports():
        if package_of(one.importer) == package_of(one.imported) == package:
            edges.setdefault(one.importer, set()).add(one.imported)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for following in edges.get(waiting.pop(), set()) - seen:
                seen.add(following)
                waiting.append(following)
        return seen

    assert sorted(module for module in edges if module in reachable(module)) == []


def test_packages_import_downwards_only() -> None:
    wrong = [
        str(one)
        for one in imports()
        if (own := package_of(one.importer)) != (other := package_of(one.imported)) and other not in PACKAGES[own]
    ]
    assert wrong == []


def test_only_benchmarks_reach_the_exporter_and_only_when_they_run() -> None:
    """A plain install has nothing that the exporter needs."""
    reaching = [
        one
        for one in imports()
        if package_of(one.importer) == "zimage_rt" and package_of(one.imported) == "zimage_export"
    ]
    assert reaching, "the benchmark's reference is the exporter's"
    assert [str(one) for one in reaching if room_of(one.importer) != "bench" or not one.in_function] == []


def test_the_console_is_for_commands() -> None:
    room = "zimage_runtime.command_line"
    wrong = [
        str(one)
        for one in imports()
        if one.imported.startswith(room) and one.imported != PROGRESS and not one.importer.startswith((room, *COMMANDS))
    ]
    assert wrong == []
    own = [one for one in imports() if one.importer == PROGRESS]
    assert [str(one) for one in own if room_of(one.imported) not in ("errors", "units")] == []


def test_the_runtime_imports_none_of_the_exporters_libraries() -> None:
    heavy = ("torch", "onnx", "diffusers", "transformers", "safetensors", "ml_dtypes")
    found = []
    for name, path in modules().items():
        if package_of(name) == "zimage_runtime":
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                found += [f"{name}: {n}" for n in names if n.partition(".")[0] in heavy]
    assert found == []
