"""Packs what a GPU machine without a network lacks, in pieces that fit its transfers.

    python benchmarks/device/pack.py --out DIR [--wheels DIR] [--capability 90] [--also tensorrt]

Wheels come from the package index through pip, or from --wheels alone with `--offline`. The archive holds one folder of
packages, which `run.sh` puts on the path.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from prune_fatbins import prune

ROOT = Path(__file__).resolve().parents[2]

PACKAGES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime-gpu==1.31.1",),
    "diffusers": ("diffusers==0.42.1", "importlib-metadata==10.2.0"),
    "nvml": ("nvidia-ml-py==13.615.71", "psutil==7.1.3"),
}
"""What is carried, by a name for `--without`. The machine has torch and NVIDIA's CUDA and cuDNN wheels."""

MORE: dict[str, tuple[str, ...]] = {
    "tensorrt": (
        "tensorrt-rtx-cu13-libs==1.7.1.116",
        "tensorrt-rtx-cu13-bindings==1.7.1.116",
        "cuda-bindings==13.5.0",
        "cuda-pathfinder==1.9.1",
    ),
}
"""What is carried where it is asked for: TensorRT for RTX serves compute capabilities 7.5, 8.6, 8.9 and 12.0."""

UNNEEDED = (
    "onnxruntime/capi/libonnxruntime.so.*",  # for C programs
    "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
    "onnxruntime/transformers",
    "onnxruntime/tools",
    "onnxruntime/quantization",
)
FAT = ("onnxruntime/capi/libonnxruntime_providers_cuda.so",)
"""Libraries with device code."""

PIECE = 46_000_000  # bytes, so that a working tree of 20 MB fits beside one in 64 MiB
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def wanted(without: Sequence[str], also: Sequence[str]) -> list[str]:
    """The packages to carry, each with its version."""
    kept = [packages for name, packages in PACKAGES.items() if name not in without]
    return [package for packages in (*kept, *(MORE[name] for name in also)) for package in packages]


def download(packages: Sequence[str], folder: Path, python: str) -> None:
    """The wheels of packages for x86-64 Linux, without what they depend on."""
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    words = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *words, "-d", str(folder), *packages], check=True)


def unpack(wheels: Path, site: Path) -> None:
    """All wheels of a folder, as pip would put them into a folder of packages."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def thin_out(site: Path, generation: int) -> None:
    """Leaves out what is not needed there, and the device code of other GPUs."""
    for pattern in UNNEEDED:
        for path in list(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in FAT:
        if (library := site / name).exists():
            data = bytearray(library.read_bytes())
            found = prune(data, {generation})
            if not found.after.get(generation):
                raise SystemExit(f"error: {name} has no code for compute capability {generation / 10}")
            library.write_bytes(data)


def name_ourselves(site: Path) -> None:
    """Tells Python which version of this package the working tree is, without an installation."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    folder = site / f"zimage_rt-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: zimage-rt\nVersion: {version}\n")


def compress(site: Path, archive: Path) -> None:
    """One archive of the folder of packages; on all cores, where the xz command is here."""
    if xz := shutil.which("xz"):
        with archive.open("wb") as file, subprocess.Popen([xz, "-2", "-T0"], stdin=subprocess.PIPE, stdout=file) as one:
            with tarfile.open(fileobj=one.stdin, mode="w|") as tar:
                tar.add(site, ".")
            assert one.stdin is not None
            one.stdin.close()
        if one.returncode:
            raise SystemExit(f"error: xz ended with status {one.returncode}")
        return
    with tarfile.open(archive, "w:xz", preset=2) as tar:
        tar.add(site, ".")


def split(archive: Path, out: Path, piece: int) -> Iterator[Path]:
    """The archive's pieces: out/a/piece, out/b/piece, …"""
    with archive.open("rb") as file:
        for number in range(26):
            data = file.read(piece)
            if not data:
                return
            path = out / "abcdefghijklmnopqrstuvwxyz"[number] / "piece"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            yield path
    raise SystemExit("error: more than 26 pieces; give a larger --piece")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the pieces are put")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that is kept")
    parser.add_argument("--offline", action="store_true", help="take the wheels of --wheels, and download none")
    parser.add_argument("--without", nargs="*", default=[], choices=PACKAGES)
    parser.add_argument("--also", nargs="*", default=[], choices=MORE)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, without the dot")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--piece", type=int, default=PIECE, metavar="BYTES")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        wheels, site = given.wheels or Path(work) / "wheels", Path(work) / "site"
        if not given.offline:
            download(wanted(given.without, given.also), wheels, given.python)
        unpack(wheels, site)
        thin_out(site, given.capability)
        name_ourselves(site)
        archive = Path(work) / "site.tar.xz"
        compress(site, archive)
        shutil.rmtree(given.out, ignore_errors=True)
        for path in split(archive, given.out, given.piece):
            print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
