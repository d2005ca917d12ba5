"""Whether the package of ONNX Runtime that is installed suits a GPU and its driver, and which one would.

Found in the packages on PyPI: onnxruntime-gpu is for CUDA 12 up to 1.26 and for CUDA 13 from 1.27 on. Its provider for
CUDA 13 (1.31.1) has code for compute capabilities 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0.
"""

from typing import Any

from ...machine.cuda_versions import supported_cuda, why_old_driver
from ...machine.gpus import Gpu

OLDEST = (1, 26)
"""The first version whose `Attention` of opset 23 has CUDA kernels for bf16 and grouped queries (onnxruntime #27542).
Tested: 1.31.1."""

OLDEST_GPU = (7, 5)
"""The first compute capability that CUDA 13 compiles for."""

_UNINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu"

SWAP_TO_GPU = (_UNINSTALL, 'pip install "onnxruntime-gpu[cuda,cudnn]>=1.26"')
"""The two commands that put onnxruntime-gpu, with NVIDIA's libraries, in the place of onnxruntime."""

SWAP_TO_CUDA_12 = (_UNINSTALL, 'pip install "onnxruntime-gpu[cuda,cudnn]==1.26.0"')
"""The same for CUDA 12, which older drivers and GPUs can use."""

SWAP_TO_CPU = (_UNINSTALL, "pip install onnxruntime")


def swap_for(gpu: Gpu | None) -> str:
    """What to do to get a package for a GPU, as the end of a sentence."""
    old = gpu is not None and (supported_cuda(gpu) < 13 or gpu.capability < OLDEST_GPU)
    first, second = SWAP_TO_CUDA_12 if old else SWAP_TO_GPU
    return f"run `{first}`, then `{second}`"


def why_unsuited(gpu: Gpu) -> str | None:
    """Why the package that is installed cannot use a GPU; None where it can, as far as that is known."""
    import onnxruntime

    package, needed = f"onnxruntime-gpu {onnxruntime.__version__}", built_for_cuda()
    if _version(onnxruntime.__version__) < OLDEST:
        return f"{package} lacks kernels that bundles need, which came with 1.26; {swap_for(gpu)}"
    if needed is None:
        return None
    if needed >= 13 and gpu.capability < OLDEST_GPU:
        return (
            f"{gpu} is older than CUDA {needed}, which {package} is for and which starts at 7.5; "
            f"use --executor webgpu or cpu, or, untested, {swap_for(gpu)}"
        )
    if reason := why_old_driver(gpu, needed, package):
        return f"{reason}, or {swap_for(gpu)}" if supported_cuda(gpu) >= 12 else reason
    return None


def built_for_cuda() -> int | None:
    """The major version of the CUDA that the package was built for; None for a package that does not say."""
    try:
        from onnxruntime.capi import build_and_package_info
    except ImportError:
        return None
    text: Any = getattr(build_and_package_info, "cuda_version", None)
    major = str(text or "").split(".")[0]
    return int(major) if major.isdigit() else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
