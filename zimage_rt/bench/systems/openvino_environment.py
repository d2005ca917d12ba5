"""OpenVINO GenAI's packages, in a virtual environment of their own: its exporter needs other versions than ours does.

python -m zimage_rt.bench.systems.openvino_environment            # makes it: 2 GB in the cache folder
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = "2026.4.1.0"
PACKAGES = (
    f"openvino-genai=={VERSION}",
    "optimum-intel==2.2.0",
    "diffusers==0.39.0",  # the newest that it takes
    "torch==2.13.0",
)
COMMAND = "python -m zimage_rt.bench.systems.openvino_environment"


def environment_folder() -> Path:
    """Where it is made: in the user's cache, for this Python."""
    root = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Path(root or Path.home() / ".cache") / "zimage-rt" / f"openvino-genai-{VERSION}-{python}"


def is_made(folder: Path) -> bool:
    """Whether everything is installed there."""
    return (folder / "complete").exists()


def script(folder: Path, name: str) -> Path:
    """A program of the environment."""
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / name


def site_packages(folder: Path) -> Path:
    """Where its packages are, for this Python."""
    found = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    return Path(found)


def make(folder: Path) -> None:
    """Makes the environment and installs the packages, through pip as it is configured."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(script(folder, "python")), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *PACKAGES], check=True)
    # torchvision: a build other than torch's keeps transformers from loading, and no image is read here. Telemetry: the
    # exporter sends usage to its maker unless the package is missing, and nothing that we start does that.
    subprocess.run([*pip, "uninstall", "--yes", "--quiet", "torchvision", "openvino-telemetry"], check=True)
    (folder / "complete").touch()


if __name__ == "__main__":
    make(environment_folder())
    print(environment_folder())
