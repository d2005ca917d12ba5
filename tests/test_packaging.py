"""The wheel: exactly what it should carry, and usable without the export extra."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from facts import assert_facts

pytestmark = pytest.mark.deep

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {  # name → folder of the repository that holds it
    "zimage_export": REPOSITORY / "export",
    "zimage_runtime": REPOSITORY / "runtime",
    "zimage_rt": REPOSITORY,
}
OPTIMUM_COMMAND = "optimum/commands/register/zimage.py"
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "out")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the repository, tests and benchmarks included, built without the network."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(REPOSITORY, source, ignore=LEFT_OUT)
    out = source.parent / "dist"
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *offline, "--wheel-dir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> Message:
    (path,) = unpacked.glob("*.dist-info/METADATA")
    return Parser().parsestr(path.read_text(encoding="utf-8"))


def run_isolated(code: str, *paths: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter that sees the standard library and the given paths, and nothing installed."""
    setup = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}; "
    command = [sys.executable, "-I", "-S", "-c", setup + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_the_wheel_carries_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    carried = [name for name in names if ".dist-info/" not in name]
    modules = {
        str(path.relative_to(home).as_posix())
        for package, home in PACKAGES.items()
        for path in (home / package).rglob("*.py")
    }
    typed = {f"{package}/py.typed" for package in PACKAGES}
    expected = modules | typed | {OPTIMUM_COMMAND}
    assert expected <= set(carried)
    others = [name for name in carried if name not in expected]
    folders = (REPOSITORY / "zimage_rt" / "demo_bundle", REPOSITORY / "zimage_rt" / "serve" / "page")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    data = {path.relative_to(REPOSITORY).as_posix() for path in files}
    assert "zimage_rt/serve/page/index.html" in data
    assert set(others) == data


def test_the_wheel_carries_the_demo_model_once(wheel: Path) -> None:
    """Its bundle; the checkpoint and the training code stay in the repository."""
    assert wheel.stat().st_size < 10e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(name.startswith("zimage_rt/demo_bundle/") for name in names)
    assert not [name for name in names if "demo_model" in name or "/tiny/" in name]


def test_outside_the_repository_tiny_says_where_it_is(unpacked: Path, tmp_path: Path) -> None:
    site_packages = Path(sysconfig.get_path("purelib"))
    code = "from zimage_export.source.checkpoint import Checkpoint; print(Checkpoint.open('tiny').name)"
    outside = run_isolated(code, unpacked, site_packages, cwd=tmp_path)
    error = outside.stderr.splitlines()[-1]
    assert error.startswith("zimage_export.errors.CheckpointError: ")
    assert_facts(error, "tiny:", "clone", "demo_model/tiny")
    inside = run_isolated(code, unpacked, site_packages, cwd=REPOSITORY)
    assert inside.stdout == "tiny\n", inside.stderr


def test_a_plain_install_needs_no_torch(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist") or []
    plain = {line.split(">")[0].split("=")[0].strip() for line in requirements if "extra ==" not in line}
    assert {"numpy", "onnxruntime", "tokenizers"} <= plain
    assert not plain & {"torch", "diffusers", "transformers", "onnx", "optimum", "safetensors"}
    assert any(line.startswith("torch") and 'extra == "export"' in line for line in requirements)


def test_the_wheel_names_both_commands(unpacked: Path) -> None:
    (path,) = unpacked.glob("*.dist-info/entry_points.txt")
    lines = path.read_text().splitlines()
    assert "zimage-rt = zimage_rt.cli:main" in lines
    assert "zimage-export = zimage_export.cli:main" in lines


def test_the_unpacked_wheel_imports_alone(unpacked: Path, metadata: Message) -> None:
    code = "import zimage_rt; from importlib.metadata import version; print(zimage_rt.__file__, version('zimage-rt'))"
    result = run_isolated(code, unpacked)
    assert result.stderr == ""
    assert result.stdout.split() == [str(unpacked / "zimage_rt" / "__init__.py"), metadata["Version"]]


def test_optimum_finds_the_command_of_an_installed_wheel(unpacked: Path) -> None:
    site_packages = Path(sysconfig.get_path("purelib"))  # optimum is here; its .pth files are not read
    code = "from optimum.commands.optimum_cli import main; sys.argv = ['optimum-cli', 'export', '--help']; main()"
    assert "zimage" in run_isolated(code, unpacked, site_packages).stdout
    assert "zimage" not in run_isolated(code, site_packages).stdout, "it comes from the wheel"
