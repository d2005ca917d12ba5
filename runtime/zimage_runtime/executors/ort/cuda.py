"""The `cuda` executor: ONNX Runtime's CUDA provider on the programs for CUDA, on every GPU that it supports."""

import contextlib
import io
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ...bundle.bundle import Bundle
from ...bundle.controlnet import ControlNet
from ...bundle.manifest import CUDA, Precision
from ...errors import BundleError, ExecutorError, RequestError
from ...machine.gpu_targets import GpuTarget
from ...machine.gpus import BF16_SINCE, Gpu, find_gpu
from ...model.programs import Program
from ..examination import Examination, Verdict
from ..overheads import DESKTOP, ORT_CUDA
from ..protocol import ExecutorKind, Hardware, Options, Unavailable, Work
from ..worker import Stop
from .control_programs import check_programs
from .cuda_package import swap_for, why_unsuited
from .cuda_plan import plan_vram, predict_vram
from .device import OrtDevice
from .device_executor import OrtDeviceExecutor
from .device_plan import VramPlan
from .int8_denoiser import denoiser_programs, why_no_int8
from .known_answer import is_right, known_answer

PROVIDER = "CUDAExecutionProvider"

DISABLED_OPTIMIZERS = ["QDQSelectorActionTransformer"]
"""It turns a widened weight and its product into `MatMulNBits`: all weights would be repacked, on the host, at load."""


@dataclass(frozen=True)
class CudaProvider:
    """ONNX Runtime's CUDA provider; with a device of kind "cpu", the CPU's in its place. Implements `Provider`."""

    device: OrtDevice
    budget: int  # bytes
    exact: bool  # float32 products are not rounded to TF32

    checks_outputs = False
    halves_hints = True

    @property
    def library(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    @property
    def shrinks(self) -> str | None:
        return f"gpu:{self.device.index}" if self.device.kind == "cuda" else None

    def exclusive(self, stop: Stop) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def session(self, model: str | bytes, options: Any, program: Program | None, nbytes: int) -> Any:
        import onnxruntime

        chatter = io.StringIO()  # the library prints, to stdout too, which is the command's own
        with contextlib.redirect_stdout(chatter):
            session = onnxruntime.InferenceSession(
                model, options, providers=self._providers(), enable_fallback=0, disabled_optimizers=DISABLED_OPTIMIZERS
            )
        if self.device.kind == "cuda" and PROVIDER not in session.get_providers():
            # which the library says in its log alone, and then runs everything on the CPU
            raise ExecutorError(
                "ONNX Runtime could not start CUDA: a library of CUDA or cuDNN is missing or of another version; "
                "run `zimage-rt doctor`"
            )
        return session

    def _providers(self) -> list[Any]:
        if self.device.kind == "cpu":
            return ["CPUExecutionProvider"]
        return [(PROVIDER, self.options()), "CPUExecutionProvider"]

    def options(self) -> dict[str, str]:
        """What the provider is set to, for one session."""
        return {
            "device_id": str(self.device.index),
            "arena_extend_strategy": "kSameAsRequested",  # the other one doubles, up to the next power of two
            "gpu_mem_limit": str(max(self.budget - ORT_CUDA.nbytes, 1)),
            "cudnn_conv_algo_search": "HEURISTIC",  # the exhaustive one runs every algorithm for every new size
            # how much memory a convolution may take besides has no setting: with cuDNN 9 nothing reads
            # `cudnn_conv_use_max_workspace` (`conv.cc`). It comes from the arena, within its limit
            "use_tf32": str(int(not self.exact)),  # 10 bits of fraction: plenty beside 16-bit weights, not for fp32
        }


def cuda_executor(
    bundle: Bundle,
    *,
    budget: int,
    low_memory: bool = False,
    keep_loaded: bool = True,
    device: OrtDevice | None = None,
    capability: tuple[int, int] | None = None,
    device_name: str = "an NVIDIA GPU",
    denoiser: str | None = None,
) -> OrtDeviceExecutor:
    """The executor on a device. `budget` is what may be held there, in bytes; `capability` is the GPU's.

    Raises `ExecutorError` for a GPU that cannot run the bundle.
    """
    device, precision = device or OrtDevice(), bundle.manifest.precision
    if capability and (reason := why_no_int8(precision, capability)):
        raise ExecutorError(f"the GPU cannot run this bundle: {reason}")
    if device.kind == "cuda":
        preload_libraries()  # tiles copy their weights to the GPU before any session is made

    def plan(work: Work) -> VramPlan:
        if work.control is not None and capability is not None:
            _check_control(work.control, capability, device_name)
        return plan_vram(bundle.manifest, work, budget, capability=capability, denoiser=denoiser)

    return OrtDeviceExecutor(
        CUDA,
        bundle,
        CudaProvider(device, budget, precision is Precision.FP32),
        plan,
        budget=budget,
        denoiser=denoiser or denoiser_programs(bundle.manifest, capability)[0],
        low_memory=low_memory,
        keep_loaded=keep_loaded,
        device_name=device_name,
    )


def _check_control(net: ControlNet, capability: tuple[int, int], gpu: str) -> None:
    """Raises `RequestError` for a ControlNet in a precision in which a GPU does not compute."""
    reason = why_no_int8(net.manifest.precision, capability)
    if net.manifest.precision is Precision.BF16 and capability < BF16_SINCE:
        reason = "it does not compute in bf16; use fp16"
    if reason:
        raise RequestError(f"{net.root}: {gpu} cannot run this ControlNet: {reason}")


WIDE_SUMS = ("ORT_CUDA_GEMM_OPTIONS", "2")
"""cuBLAS may split a product's inner axis and add the parts up in the output's type. In fp16 a part may be infinite
where the sum is not. Bit 1 forbids it (``cuda_common.cc`` in ONNX Runtime reads it at the first fp16 product)."""

_preloaded = False


def preload_libraries() -> str:
    """Loads CUDA and cuDNN from NVIDIA's wheels, once, which has to be before anything uses the GPU. Returns what the
    library complained of."""
    global _preloaded
    if _preloaded:
        return ""
    import onnxruntime

    os.environ.setdefault(*WIDE_SUMS)

    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
    _preloaded = True
    return " ".join(chatter.getvalue().split())


def why_no_provider(gpu: Gpu | None = None) -> str | None:
    """Why the ONNX Runtime that is installed cannot use CUDA; None where it can. What to install depends on the GPU."""
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        preload_libraries()  # as a plug-in, the provider is there only when CUDA's libraries are
    if PROVIDER not in onnxruntime.get_available_providers():
        return f"the installed ONNX Runtime is for the CPU alone; {swap_for(gpu)}"
    return None


def _why_unavailable(bundle: Bundle, device: int) -> Unavailable | None:
    try:
        gpu = find_gpu(device)
    except ExecutorError as error:
        return Unavailable(str(error), of_machine=True)
    if missing := bundle.manifest.missing(CUDA):
        return Unavailable(f"{bundle.root} holds no {', '.join(missing)} program for cuda; export it again")
    if bundle.manifest.precision is Precision.BF16 and not gpu.has_bf16:
        return Unavailable(f"{gpu} does not compute in bf16; use a bundle in fp16")
    if reason := why_no_int8(bundle.manifest.precision, gpu.capability):
        return Unavailable(f"{gpu}: {reason}")
    if reason := why_no_provider(gpu) or why_unsuited(gpu):
        return Unavailable(reason)
    return None


def _open(bundle: Bundle, options: Options) -> OrtDeviceExecutor:
    gpu = find_gpu(options.device)
    return cuda_executor(
        bundle,
        budget=budget_of(gpu) if options.vram is None else options.vram,
        low_memory=options.low_memory,
        keep_loaded=options.keep_loaded,
        device=OrtDevice(index=options.device),
        capability=gpu.capability,
        device_name=str(gpu),
    )


def budget_of(gpu: Gpu) -> int:
    """Bytes of a GPU's memory that may be used: what is free now, less what varies."""
    return max(gpu.free - DESKTOP.nbytes, 0)


def _predict(bundle: Bundle, work: Work, hardware: Hardware) -> VramPlan:
    if missing := bundle.manifest.missing(CUDA):
        raise BundleError(f"{bundle.root} holds no {', '.join(missing)} program for cuda; export it again")
    capability = GpuTarget(hardware.gpu).capability if hardware.gpu else None
    plan = predict_vram(bundle.manifest, work, hardware.memory, capability)
    check_programs(bundle, work, CUDA, plan.denoiser)
    return plan


def _examine() -> Examination:
    try:
        gpu = find_gpu()
    except ExecutorError as error:
        return Examination(Verdict.OK, f"not used ({error})", {"gpu": None})
    values = {"gpu": gpu.name}
    if reason := why_no_provider(gpu):
        return Examination(Verdict.NOTE, reason, values)
    if reason := why_unsuited(gpu) or _fault(gpu):
        return Examination(Verdict.PROBLEM, reason, values)
    return Examination(Verdict.OK, f"{gpu.name} computes a known answer correctly", values)


def _fault(gpu: Gpu) -> str | None:
    """What keeps ONNX Runtime from computing on the GPU: the known answer, there."""
    import onnxruntime

    complaint = preload_libraries()
    library, remedy = f"ONNX Runtime {onnxruntime.__version__}", swap_for(gpu)
    try:
        answer, session = known_answer([PROVIDER], enable_fallback=0)
    except Exception as error:  # whatever a broken library raises
        return f"{library} cannot compute on it ({' '.join(str(error).split())[:200]}); {remedy}"
    if PROVIDER not in session.get_providers():
        what = complaint[:200] or "a library of CUDA or cuDNN is missing or of another version"
        return f"{library} cannot start CUDA ({what}); {remedy}"
    return None if is_right(answer) else f"{library} computes wrong numbers on it; {remedy}"


KIND = ExecutorKind(
    on_gpu=True, why_unavailable=_why_unavailable, open=_open, predict=_predict, examine=_examine, takes_control=True
)
