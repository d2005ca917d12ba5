"""What the registry knows of the `tensorrt` executor: whether it can run here, opening it, and plans without a GPU."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ...bundle.bundle import Bundle
from ...errors import BundleError, ExecutorError, ZImageRuntimeError
from ...machine.cuda_versions import why_old_for_bindings
from ...machine.gpu_targets import OLDEST, GpuTarget, Variant, gpu_of, variant_of
from ...machine.gpus import find_gpu
from ...machine.host_memory import available_memory
from ...model.blocks import main_blocks
from ..examination import Examination, Verdict
from ..overheads import TENSORRT_CUDA, TENSORRT_MARGIN
from ..protocol import ExecutorKind, Hardware, Options, Unavailable, Work
from .cuda import CudaDevice
from .engine_store import EngineStore, read_catalog, variant_spec
from .executor import TensorRtExecutor
from .plan import ResidencyPlan, plan_residency
from .trt_api import FULL, RTX, library_for

_PINNED_SHARE = 0.5  # of the host's available memory, which streamed blocks may hold


def why_unavailable(bundle: Bundle, device: int) -> Unavailable | None:
    """Why TensorRT cannot run a bundle on a GPU of this machine."""
    try:
        gpu = find_gpu(device)
    except ExecutorError as error:
        return Unavailable(str(error), of_machine=True)
    if reason := why_old_for_bindings(gpu):
        return Unavailable(reason)
    try:
        capability = CudaDevice(device).capability
        library_for(capability)
        variant_spec(read_catalog(bundle), capability)
    except ZImageRuntimeError as error:
        return Unavailable(str(error))
    return None


def open_executor(bundle: Bundle, options: Options) -> TensorRtExecutor:
    """The executor for a GPU. One engine is loaded, so that an engine that cannot be fails here.

    Raises `ExecutorError` without package, driver or GPU, and `BundleError` for a bundle without block programs.
    """
    device = CudaDevice(options.device)
    library = library_for(device.capability)
    catalog = read_catalog(bundle)  # after the GPU: without one, the error must be about that
    spec = variant_spec(catalog, device.capability)
    store = EngineStore(bundle, catalog, library, device.capability, options.note, options.trust_engines)
    store.load(spec.program_of(main_blocks(bundle.manifest.config)[0]).name)
    free, total = device.memory()
    available = min(free + TENSORRT_CUDA.nbytes, total)  # CUDA has what it needs for itself by now
    return TensorRtExecutor(
        bundle,
        device,
        store,
        spec,
        max(available - margin(total), 0) if options.vram is None else min(options.vram, available),
        int(available_memory() * _PINNED_SHARE),
        options.keep_loaded,
        f"{library.name} {library.version}",
        options.note,
    )


def margin(total: int) -> int:
    """Bytes of a GPU's memory that are left to others if no budget is given."""
    return max(TENSORRT_MARGIN.nbytes, total // 20)


def predict(bundle: Bundle, work: Work, hardware: Hardware) -> ResidencyPlan:
    """The plan for a GPU, which need not be in this machine."""
    wanted = [GpuTarget(hardware.gpu).variant] if hardware.gpu else [Variant.AMPERE, Variant.TURING]
    variants = read_catalog(bundle).variants
    spec = next((variants[variant] for variant in wanted if variant in variants), None)
    if spec is None:
        where = hardware.gpu or "any GPU"
        raise BundleError(f"{bundle.root}: has no block programs for {where}; add them with zimage-export engines")
    return plan_residency(spec, bundle.manifest, work, hardware.memory)


def examine() -> Examination:
    """Which packages, driver and GPU the executor finds here, and what is missing."""
    library = next((package for package in (RTX, FULL) if find_spec(package)), None)
    bindings = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    values: dict[str, Any] = {
        "library": library,
        "version": _installed(library) if library else None,
        "bindings": _installed("cuda-bindings"),
        "gpu": None,
        "capability": None,
    }
    missing = [package for package, here in ((RTX, library), ("cuda-bindings", bindings)) if not here]
    if missing:
        text = f"{' and '.join(missing)} not installed; run `pip install 'zimage-rt[tensorrt]'` for an NVIDIA GPU"
        return Examination(Verdict.NOTE, text, values)
    installed = f"{library} {values['version']}"
    try:
        device = CudaDevice()
    except ZImageRuntimeError:
        if reason := _why_old_driver():
            return Examination(Verdict.PROBLEM, f"{installed}, but {reason}", values)
        text = f"{installed}, but no NVIDIA driver with a GPU: engines can be built here, but not run"
        return Examination(Verdict.NOTE, text, values)
    capability = device.capability
    values |= {"gpu": device.name, "capability": list(capability)}
    if capability < OLDEST:
        text = f"{installed}; {device.name} is older than TensorRT supports (7.5): use --executor cpu"
        return Examination(Verdict.NOTE, text, values)
    try:
        serving = library_for(capability)
    except ZImageRuntimeError as error:
        return Examination(Verdict.NOTE, f"{device.name}: {error}", values)
    target = gpu_of(capability)
    text = (
        f"{serving.name} {serving.version}; {device.name}, {target} ({target.label}): runs the "
        f"{variant_of(capability)} programs of bundles that `zimage-export engines` was run on"
    )
    return Examination(Verdict.OK, text, values)


def _why_old_driver() -> str | None:
    """CUDA finds no GPU on an old driver: NVML does."""
    try:
        return why_old_for_bindings(find_gpu())
    except ExecutorError:
        return None


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


KIND = ExecutorKind(on_gpu=True, why_unavailable=why_unavailable, open=open_executor, predict=predict, examine=examine)
