"""Nothing is written into the user's folders that was not asked for, by any of the ways into the product.

From 1.29 on, ONNX Runtime's telemetry leaves a device id in the user's cache as soon as it is loaded. That it is not
there shows that telemetry is off, and was off before the import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = "import sys; from zimage_rt.cli import main; sys.argv = ['zimage-rt', *sys.argv[1:]]; main()"
PYTHON = """
import sys
from zimage_rt import Pipeline, demo_bundle
images = Pipeline.from_bundle(demo_bundle(), executor="cpu").generate("a circle", size=(32, 32), steps=1, seed=1).images
images[0].save(sys.argv[1])
"""
DRAW = ("a circle", "--size", "32x32", "--steps", "1", "--seed", "1", "--executor", "cpu", "-o")


@pytest.mark.parametrize(
    ("code", "words", "writes"),
    [
        pytest.param(COMMAND, ("run", *DRAW), True, id="run"),
        pytest.param(PYTHON, (), True, id="python"),
        pytest.param(COMMAND, ("doctor",), False, id="doctor"),
    ],
)
def test_nothing_appears_in_the_home_folder(code: str, words: tuple[str, ...], writes: bool, tmp_path: Path) -> None:
    home, image = tmp_path / "home", tmp_path / "image.png"
    home.mkdir()
    ours = ("ORT_DISABLE_TELEMETRY", "HF_HOME")  # what this very process may have set, or its user
    environment = {name: value for name, value in os.environ.items() if name not in ours and "XDG_" not in name}
    folders = {"HOME": home, "USERPROFILE": home, "LOCALAPPDATA": home / "local", "XDG_CACHE_HOME": home / "cache"}
    # a driver's own cache, which any program on the GPU fills: not in the home folder that is looked at
    folders["MESA_SHADER_CACHE_DIR"] = Path(os.environ.get("MESA_SHADER_CACHE_DIR", Path.home() / ".cache"))
    command = [sys.executable, "-c", code, *words, *([str(image)] if writes else [])]
    subprocess.run(
        command,
        env={**environment, **{name: str(folder) for name, folder in folders.items()}},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert image.exists() == writes
    assert sorted(path.relative_to(home).as_posix() for path in home.rglob("*")) == []
