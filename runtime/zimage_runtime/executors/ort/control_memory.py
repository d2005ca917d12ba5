"""What a ControlNet takes of memory besides the weights of its programs: hints, tokens, activations."""

from ...bundle.manifest import CPU, Manifest, extended
from ...model.geometry import padded
from ...model.programs import CONTROL_PROGRAMS, CONTROLLED_PROGRAMS, MODEL_PROGRAMS, Program
from ..protocol import Work
from .control_programs import control_name, program_name

_FLOAT = 4


def programs_of(work: Work) -> tuple[Program, ...]:
    """The programs that a request runs."""
    model = tuple(program for program in MODEL_PROGRAMS if program is not Program.ENCODER or work.encodes)
    if work.control is None:
        return model
    return (*model, *CONTROLLED_PROGRAMS, *work.control.manifest.config.programs)


def weight_bytes(program: Program, manifest: Manifest, work: Work, executor: str = CPU, denoiser: str = CPU) -> int:
    """Bytes of the weights that a program uses."""
    if program in CONTROL_PROGRAMS:
        if work.control is None:
            return 0
        of_control = work.control.manifest
        record = of_control.record(program, control_name(of_control, program, executor, denoiser))
    else:
        name = program_name(program, executor, denoiser) if program in CONTROLLED_PROGRAMS else executor
        record = manifest.record(program, extended(name) if program in CONTROLLED_PROGRAMS else name)
    return record.weight_bytes if record else 0


def hint_bytes(work: Work, element: int = _FLOAT) -> int:
    """Bytes of the hints of a step, which stay from the ControlNet's layers until the denoiser is done."""
    if work.control is None:
        return 0
    config = work.control.manifest.config
    tokens = work.batch * (work.geometry.image_tokens + padded(work.tokens))
    return element * len(config.places) * tokens * config.dim


def kept_bytes(work: Work) -> int:
    """Bytes that stay for all steps: each conditioning's control tokens, rotary tables and modulation."""
    if work.control is None:
        return 0
    config, image = work.control.manifest.config, work.geometry.image_tokens
    tables = (2 * image + padded(work.tokens)) * config.head_dim
    rows = 4 * len(config.blocks) * work.steps * config.dim
    return _FLOAT * work.kept_conditionings * (image * config.dim + tables + rows)


def tokens_of(program: Program, work: Work) -> int:
    """The tokens that a program of a step runs on, of all images of a batch."""
    image = work.batch * work.geometry.image_tokens
    if program in (Program.DENOISER, Program.CONTROL_LAYERS):
        return image + work.batch * padded(work.tokens)
    if program is Program.CONTROL_TOKENS:
        return work.geometry.image_tokens
    return image if program in (Program.TOKENS, Program.REFINERS, Program.CONTROL_REFINER) else padded(work.tokens)
