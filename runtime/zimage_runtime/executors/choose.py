"""Which executor generates, and why: the one that is asked for, or the best that can run here. Never a silent one.

An *obstacle* is a reason why an executor cannot run a bundle here, in words that say what to do; None where it can.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..bundle.bundle import Bundle
from ..bundle.manifest import CPU, CUDA, TENSORRT, Precision
from ..errors import ExecutorError, RequestError
from ..machine.gpus import Gpu, find_gpu
from .ort.int8_denoiser import why_no_int8
from .protocol import Executor

AUTO = "auto"

_MARGIN = 256 << 20  # of free GPU memory that is left to others: the desktop moves

SWAP_TO_GPU = (
    "pip uninstall -y onnxruntime onnxruntime-gpu",
    'pip install "onnxruntime-gpu[cuda,cudnn]"',
)
"""The two commands that put onnxruntime-gpu, with NVIDIA's libraries, in the place of onnxruntime."""

SWAP_TO_CPU = ("pip uninstall -y onnxruntime onnxruntime-gpu", "pip install onnxruntime")


@dataclass(frozen=True)
class Choice:
    """An executor's name, and why it is that one."""

    executor: str
    why: str


def choose(bundle: Bundle, asked: str) -> Choice:
    """The executor for a bundle: `asked`, or with "auto" TensorRT where it can run, else CUDA, else the CPU.

    Raises `RequestError` for one that is unknown or cannot run here, with the reason.
    """
    if asked == CPU:
        return Choice(CPU, "asked for")
    if asked in _OBSTACLES:
        if reason := _OBSTACLES[asked](bundle):
            hint = _WITHOUT_GPU if _is_of_the_machine(reason) else ""
            raise RequestError(f"executor {asked!r} cannot run here: {reason}{hint}")
        return Choice(asked, "asked for")
    if asked != AUTO:
        raise RequestError(f"executor {asked!r} is unknown; choose one of {', '.join((AUTO, CPU, *_OBSTACLES))}")
    reasons: list[str] = []
    for name, obstacle in _OBSTACLES.items():
        reason = obstacle(bundle)
        if reason is None:
            return Choice(name, "; ".join([*reasons, f"{find_gpu()} is there"]))
        if reason not in reasons:
            reasons.append(reason if _is_of_the_machine(reason) else f"no {name}: {reason}")
        if _is_of_the_machine(reason):
            break  # without a GPU, what else is missing does not matter
    return Choice(CPU, "; ".join(reasons))


def make_executor(
    bundle: Bundle,
    choice: Choice,
    vram: int | None,
    *,
    low_memory: bool = False,
    note: Callable[[str], object] = lambda text: None,
) -> Executor:
    """The executor that was chosen. `vram` is its budget in bytes; without one, what is free on the GPU.
    `note` is told of what takes a while, once.

    Raises `RequestError` where a budget is given to the CPU.
    """
    if choice.executor == CUDA:
        from .ort.device import OrtCudaExecutor

        return OrtCudaExecutor(bundle, budget=budget(vram), low_memory=low_memory)
    if choice.executor == TENSORRT:
        from .tensorrt.executor import open_executor

        return open_executor(bundle, vram, note)
    if vram is not None:
        because = "" if choice.why == "asked for" else f" ({choice.why})"
        raise RequestError(f"vram is a budget for executors on a GPU; the {choice.executor} executor has none{because}")
    from .ort.cpu import OrtCpuExecutor

    return OrtCpuExecutor(bundle, low_memory=low_memory)


def budget(vram: int | None) -> int:
    """Bytes of GPU memory that may be used: what is given, or what is free now. Raises `ExecutorError`."""
    if vram is not None:
        return vram
    gpu = find_gpu()
    return max((gpu.total if gpu.free is None else gpu.free) - _MARGIN, 0)


def why_no_cuda(bundle: Bundle) -> str | None:
    """Why the `cuda` executor cannot run a bundle here."""
    gpu = _gpu()
    if isinstance(gpu, str):
        return gpu
    if CUDA not in bundle.manifest.executors:
        return "the bundle holds no programs for it; export it again"
    if bundle.manifest.precision is Precision.BF16 and not gpu.has_bf16:
        return f"{gpu} does not compute in bf16; use a bundle in fp16"
    if reason := why_no_int8(bundle.manifest.precision, gpu.capability):
        return f"{gpu}: {reason}"
    return why_no_package()


def why_no_tensorrt(bundle: Bundle) -> str | None:
    """Why the `tensorrt` executor cannot run a bundle here."""
    gpu = _gpu()
    if isinstance(gpu, str):
        return gpu
    from .tensorrt.executor import why_no_tensorrt as obstacle

    return obstacle(bundle)


def why_no_package() -> str | None:
    """Why the ONNX Runtime that is installed cannot use CUDA."""
    import onnxruntime

    from .ort.device import PROVIDER, preload_libraries

    if PROVIDER not in onnxruntime.get_available_providers():
        preload_libraries()  # as a plug-in, the provider is there only when CUDA's libraries are
    if PROVIDER not in onnxruntime.get_available_providers():
        first, second = SWAP_TO_GPU
        return f"the ONNX Runtime that is installed is for the CPU alone; run `{first}`, then `{second}`"
    return None


_OBSTACLES: dict[str, Callable[[Bundle], str | None]] = {TENSORRT: why_no_tensorrt, CUDA: why_no_cuda}
"""The executors on a GPU, the best one first."""

_MACHINE = "no NVIDIA GPU: "
_WITHOUT_GPU = "; `zimage-rt doctor` tells how to get what is missing, and --executor cpu works everywhere"


def _gpu() -> Gpu | str:
    """The GPU, or why there is none."""
    try:
        return find_gpu()
    except ExecutorError as error:
        return f"{_MACHINE}{error}"


def _is_of_the_machine(reason: str) -> bool:
    return reason.startswith(_MACHINE)
