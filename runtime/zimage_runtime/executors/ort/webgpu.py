"""The `webgpu` executor: ONNX Runtime's WebGPU plug-in, for GPUs of every vendor. Experimental: no GPU has run it yet.

It computes on Vulkan, Direct3D 12 or Metal. Programs of its own multiply in float32 (see the exporter's
`webgpu_layers`). Known answers are asked before it is used at all; fused attention has a verdict of its own.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ...bundle.bundle import Bundle
from ...bundle.controlnet import ControlNet
from ...bundle.manifest import WEBGPU, WEBGPU_FUSED, Manifest, Precision
from ...errors import BundleError, ExecutorError, MemoryLimitError, RequestError
from ...model.programs import Program
from ...units import gib, gib_needed
from ..examination import Examination, Verdict
from ..protocol import ExecutorKind, Hardware, Options, Unavailable, Work
from ..worker import Stop
from .attention_verdict import verdict_on
from .control_programs import check_programs
from .device import OrtDevice
from .device_executor import OrtDeviceExecutor
from .device_plan import VramPlan, best_plan
from .webgpu_adapters import Adapter, find_adapter
from .webgpu_answers import ANSWERS, answers_for, fault_of
from .webgpu_library import HOLDINGS, PACKAGE, TURN, library_version, open_session, why_no_library
from .webgpu_plan import WebGpuCosts, largest_buffer, plan_webgpu

_HINT = "`zimage-rt doctor` shows what was found"


@dataclass(frozen=True, eq=False)
class WebGpuProvider:
    """The plug-in, whose values stay on the host. Implements `Provider`."""

    device: OrtDevice = OrtDevice("cpu")  # noqa: RUF009

    shrinks = None
    checks_outputs = True
    halves_hints = False  # no type of 16 bits is on every adapter

    @property
    def library(self) -> str:
        return library_version()

    def exclusive(self, stop: Stop) -> AbstractContextManager[object]:
        return TURN.taken(stop)

    def session(self, model: str | bytes, options: Any, program: Program | None, nbytes: int) -> Any:
        # the autoencoder's weights may be bfloat16, which is widened on the host or not at all
        widens = program is not None and program.component == "vae"
        return open_session(model, options, owner=self, nbytes=nbytes, widens=widens)


def webgpu_executor(
    bundle: Bundle,
    adapter: Adapter,
    *,
    budget: int,
    fused: bool = False,
    low_memory: bool = False,
    keep_loaded: bool = True,
) -> OrtDeviceExecutor:
    """The executor on an adapter. `budget` is what may be held there, in bytes; `fused` attention has proved right."""
    provider, costs = WebGpuProvider(), costs_on(adapter, bundle.manifest, fused=fused)

    def plan(work: Work) -> VramPlan:
        if work.control is not None:
            _check_control(work.control, adapter)
        alone = plan_webgpu(bundle.manifest, work, budget, costs)
        if not HOLDINGS.others(provider):
            return alone
        taken = HOLDINGS.of_others(provider) + HOLDINGS.stale
        beside = best_plan(costs, bundle.manifest, work, max(budget - taken, 0))
        if beside.keep_all:
            return beside
        raise MemoryLimitError(
            f"all stages at once need {gib_needed(beside.peak, 2)} of GPU memory, beside {gib_needed(taken, 2)} of "
            "other pipelines in this process; as long as they have programs loaded, taking turns frees nothing: "
            "release or close them first"
        )

    return OrtDeviceExecutor(
        WEBGPU,
        bundle,
        provider,
        plan,
        budget=budget,
        denoiser=costs.denoisers[0],
        low_memory=low_memory,
        keep_loaded=keep_loaded,
        device_name=str(adapter),
    )


def _check_control(net: ControlNet, adapter: Adapter) -> None:
    """Raises `RequestError` for a ControlNet in a precision that an adapter gets wrong or does not have."""
    precision = net.manifest.precision
    fault = "WebGPU has no bf16" if precision is Precision.BF16 else None
    for answer in answers_for(precision):
        fault = fault or fault_of(answer)
    if fault:
        raise RequestError(f"{net.root}: {adapter} cannot run this ControlNet: {fault}; use one in fp16, int8 or int4")


def costs_on(adapter: Adapter, manifest: Manifest, *, fused: bool) -> WebGpuCosts:
    """What a bundle's programs take on an adapter."""
    has_fused = manifest.record(Program.DENOISER, WEBGPU_FUSED) is not None
    return WebGpuCosts((WEBGPU_FUSED if fused and has_fused else WEBGPU,), largest_buffer(adapter))


def _why_not_automatic(device: int) -> Unavailable | None:
    try:
        adapter = find_adapter()
    except ExecutorError as error:
        return Unavailable(str(error)) if why_no_library() == str(error) else _NO_GPU
    return _NO_GPU if adapter.software else None


_NO_GPU = Unavailable("no other GPU found", of_machine=True)


def _why_unavailable(bundle: Bundle, device: int) -> Unavailable | None:
    try:
        find_adapter()
    except ExecutorError as error:
        return Unavailable(str(error), of_machine=True)
    if reason := why_no_programs(bundle) or why_no_library():
        return Unavailable(reason)
    if device:
        return Unavailable(
            f"GPU {device} cannot be chosen: {PACKAGE} takes the one that it prefers; leave --device out"
        )
    return None


def why_no_programs(bundle: Bundle) -> str | None:
    """Why a bundle has nothing that WebGPU can run; None where it has."""
    if bundle.manifest.precision is Precision.BF16:
        return f"{bundle.root} is in bf16, which WebGPU does not have; use a bundle in fp16, int8 or int4"
    if missing := bundle.manifest.missing(WEBGPU):
        listed = ", ".join(missing)
        return f"{bundle.root} holds no {listed} program for webgpu; run `zimage-export programs {bundle.root}`"
    return None


def _open(bundle: Bundle, options: Options) -> OrtDeviceExecutor:
    adapter, manifest = find_adapter(), bundle.manifest
    budget = adapter.budget if options.vram is None else options.vram
    if budget is None:
        raise ExecutorError(f"the memory of {adapter} is unknown; give what may be used of it, such as --vram 8GiB")
    for answer in answers_for(manifest.precision):
        if fault := fault_of(answer):
            raise ExecutorError(f"{adapter} is not used: {fault}; update its driver, or use --executor cpu; {_HINT}")
    fused = manifest.record(Program.DENOISER, WEBGPU_FUSED) is not None and _fused(adapter, manifest)
    return webgpu_executor(
        bundle, adapter, budget=budget, fused=fused, low_memory=options.low_memory, keep_loaded=options.keep_loaded
    )


def _fused(adapter: Adapter, manifest: Manifest) -> bool:
    transformer = manifest.config.transformer
    return verdict_on(adapter, transformer.dim // transformer.n_heads).right


def _predict(bundle: Bundle, work: Work, hardware: Hardware) -> VramPlan:
    if reason := why_no_programs(bundle):
        raise BundleError(reason)
    check_programs(bundle, work, WEBGPU, WEBGPU)
    return plan_webgpu(bundle.manifest, work, hardware.memory, WebGpuCosts())


def _examine() -> Examination:
    try:
        adapter = find_adapter()
    except ExecutorError as error:
        return Examination(Verdict.OK, f"not used ({error})", {"adapter": None})
    values: dict[str, Any] = {
        "adapter": adapter.name,
        "backend": adapter.backend,
        "driver": adapter.driver or None,
        "software": adapter.software,
        "budget": adapter.budget,
        "storage_binding": adapter.binding,
        "buffer": adapter.buffer,
    }
    listed = f"{adapter}, driver {adapter.driver or 'unknown'}"
    if reason := why_no_library():
        verdict = Verdict.OK if adapter.software else Verdict.NOTE
        return Examination(verdict, f"{listed}: not used ({reason})", {**values, "library": None})
    faults = {answer: fault_of(answer) for answer in ANSWERS}
    half = faults.pop("fp16") is None
    values |= {"library": library_version(), "shader_f16": half, "known_answers": not any(faults.values())}
    if wrong := "; ".join(filter(None, faults.values())):
        verdict = Verdict.NOTE if adapter.software else Verdict.PROBLEM
        return Examination(verdict, f"{listed}: {wrong}; update the driver", values)
    attention = verdict_on(adapter, 128)
    text = "; ".join(
        [
            f"{listed}: known answers come out right",
            f"bindings of {gib(adapter.binding, 2)}, buffers of {gib(adapter.buffer, 2)}",
            "reads fp16 weights (shader-f16)" if half else "no shader-f16: bundles in fp16 do not run",
            attention.text,
            *(["computes on the processor: only for --executor webgpu"] if adapter.software else []),
        ]
    )
    return Examination(Verdict.NOTE if adapter.software else Verdict.OK, text, {**values, "fused": attention.right})


KIND = ExecutorKind(
    on_gpu=True,
    why_unavailable=_why_unavailable,
    why_not_automatic=_why_not_automatic,
    open=_open,
    predict=_predict,
    examine=_examine,
    takes_control=True,
)
