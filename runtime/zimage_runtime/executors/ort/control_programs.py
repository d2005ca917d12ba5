"""Whether a bundle and a ControlNet have what a request needs, and under which names."""

from pathlib import Path

from ...adapters.branches import ON_CPU, check_extended
from ...bundle.bundle import Bundle
from ...bundle.controlnet import ControlManifest, ControlNet
from ...bundle.manifest import CPU, CUDA_BLOCKS, CUDA_WEIGHT_ONLY, ProgramRecord, extended
from ...errors import RequestError
from ...model.branches import ALL_EXTENDED
from ...model.programs import Program
from ..protocol import Work

FOLLOWING = (Program.DENOISER, Program.REFINERS, Program.CONTROL_REFINER, Program.CONTROL_LAYERS)
"""The programs of many tokens, of which an executor may have several forms: all run in the denoiser's."""


def program_name(program: Program, executor: str, denoiser: str) -> str:
    """The name under which an executor's program is, whose denoiser's is `denoiser`."""
    return denoiser if program in FOLLOWING else executor


def control_name(manifest: ControlManifest, program: Program, executor: str, denoiser: str) -> str:
    """The same of a ControlNet's program, which need not have the bundle's precision, nor its other forms."""
    name = program_name(program, executor, denoiser)
    forms = (name, CUDA_WEIGHT_ONLY) if name == CUDA_BLOCKS else (name,)  # the nearest that a ControlNet has
    return next((form for form in forms if manifest.record(program, form) is not None), executor)


def bundle_file(
    bundle: Bundle, program: Program, executor: str, denoiser: str, *, extends: bool
) -> tuple[Path, ProgramRecord | None]:
    """The file of a bundle's program; `extends`: of the one that takes LoRA and hints. Raises `BundleError`."""
    name = program_name(program, executor, denoiser)
    name = extended(name) if extends and program in ALL_EXTENDED else name
    return bundle.program(program, name), bundle.manifest.record(program, name)


def control_file(net: ControlNet, program: Program, executor: str, denoiser: str) -> tuple[Path, ProgramRecord | None]:
    """The file of a ControlNet's program. Raises `BundleError`."""
    name = control_name(net.manifest, program, executor, denoiser)
    return net.program(program, name), net.manifest.record(program, name)


def check_programs(bundle: Bundle, work: Work, executor: str, denoiser: str) -> None:
    """Raises `BundleError` or `RequestError` where programs for a request's LoRA or ControlNet are missing."""
    names = {**ON_CPU, Program.CAPTION: executor, Program.TOKENS: executor}
    names |= {Program.DENOISER: denoiser, Program.REFINERS: denoiser}
    if work.branches is not None:
        check_extended(bundle, names)
    if work.control is None:
        return
    check_extended(bundle, names, "--control")
    _check_control(work.control, executor)


def _check_control(net: ControlNet, executor: str) -> None:
    if missing := net.manifest.missing(executor, CPU):
        raise RequestError(
            f"{net.root}: has no {', '.join(missing)} program for {executor}: it is in {net.manifest.precision}; "
            "export the ControlNet in fp16, int8 or int4, or use --executor cpu"
        )
