"""Which driver a CUDA library needs. CUDA 13 does not start on a driver that was made for CUDA 12.

Source: NVIDIA's CUDA Toolkit release notes, "Minimum Required Driver Version for CUDA Minor Version Compatibility".
"""

from importlib.metadata import PackageNotFoundError, version

from .gpus import Gpu

BINDINGS = "cuda-bindings"
"""NVIDIA's package for CUDA from Python. Its versions begin with those of the CUDA that it contains."""

_OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""By CUDA's major version, the first driver that serves all of its minor versions."""


def supported_cuda(gpu: Gpu) -> int:
    """The newest CUDA, by its major version, that a GPU's driver serves: its minor versions do not matter."""
    return int(gpu.cuda.split(".")[0])


def why_old_driver(gpu: Gpu, needed: int, package: str) -> str | None:
    """Why a GPU's driver cannot run a package that was built for CUDA `needed`; None where it can."""
    if supported_cuda(gpu) >= needed:
        return None
    driver = f"driver {gpu.driver}" if gpu.driver else "the NVIDIA driver"
    newer = _OLDEST_DRIVERS.get(needed)
    remedy = f"install driver {newer} or newer" if newer else f"install a driver for CUDA {needed}"
    return f"{driver} is for CUDA {gpu.cuda} and {package} needs CUDA {needed}; {remedy}"


def why_old_for_bindings(gpu: Gpu) -> str | None:
    """Why a GPU's driver cannot run the `cuda-bindings` that are installed; None where it can, or there are none."""
    try:
        number = version(BINDINGS)
    except PackageNotFoundError:
        return None
    return why_old_driver(gpu, int(number.split(".")[0]), f"{BINDINGS} {number}")
