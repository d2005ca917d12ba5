"""What a process loads: never torch for an image, and next to nothing for --help. Each runs in a fresh interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from facts import raises_with

HEAVY = {"torch", "transformers", "diffusers", "onnx", "safetensors", "zimage_export"}
SLOW_TO_LOAD = HEAVY | {"numpy", "onnxruntime", "tokenizers", "PIL", "tqdm", "psutil"}

REPORT = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def modules_after(code: str, *arguments: str) -> set[str]:
    """Top-level modules that are loaded when `code` is through."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}", *arguments], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_check_itself_sees_a_module() -> None:
    assert "numpy" in modules_after("import numpy.linalg")


def test_an_image_loads_no_torch(bundle: Path) -> None:
    code = (
        "import sys\n"
        "from zimage_rt import Pipeline\n"
        "result = Pipeline.from_bundle(sys.argv[1]).generate('a red fox', size=(32, 48), steps=1, seed=1)\n"
        "assert result.images[0].size == (32, 48)"
    )
    loaded = modules_after(code, str(bundle))
    assert {"numpy", "onnxruntime", "tokenizers", "PIL"} <= loaded
    assert not loaded & HEAVY


def test_the_command_generates_without_torch(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from zimage_rt.cli import main\n"
        "bundle, out = sys.argv[1:]\n"
        "sys.argv = ['zimage-rt', 'run', 'a red fox', '-m', bundle, '-o', out, '--size', '32x48', '--steps', '1']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code"
    )
    out = tmp_path / "fox.png"
    loaded = modules_after(code, str(bundle), str(out))
    assert out.is_file()
    assert "onnxruntime" in loaded
    assert not loaded & HEAVY


def test_importing_the_package_loads_nothing() -> None:
    assert not modules_after("import zimage_rt") & SLOW_TO_LOAD


def test_an_unknown_name_is_an_attribute_error() -> None:
    import zimage_rt

    with raises_with(AttributeError, "'zimage_rt'", "'Pipelines'"):
        _ = zimage_rt.Pipelines


def test_every_public_name_is_there() -> None:
    import zimage_rt

    for name in zimage_rt.__all__:
        assert getattr(zimage_rt, name).__name__ == name


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("zimage_rt.cli", ["zimage-rt", "--help"]),
        ("zimage_rt.cli", ["zimage-rt", "run", "--help"]),
        ("zimage_rt.cli", ["zimage-rt", "bench", "--help"]),
        ("zimage_rt.cli", ["zimage-rt", "batch", "--help"]),
        ("zimage_rt.cli", ["zimage-rt", "--version"]),
        ("zimage_export.cli", ["zimage-export", "--help"]),
        ("zimage_export.cli", ["zimage-export", "build", "--help"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_loads_next_to_nothing(module: str, arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = {arguments!r}\n"
        f"from {module} import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code"
    )
    assert not modules_after(code) & (SLOW_TO_LOAD - {"zimage_export"})
