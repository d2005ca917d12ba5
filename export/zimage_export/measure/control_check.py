"""The check that ends the export of a ControlNet, and its distance to the file, on fixed inputs.

The distance is taken to diffusers' own blocks in float32, with the tensors of one block in memory at a time. It needs
no model: tokens, caption and timesteps are random values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.controlnet import ControlNet
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.control import ControlConfig, Refiner
from zimage_runtime.model.geometry import padded
from zimage_runtime.model.programs import Program

from ..errors import ExportError
from ..source.control_file import ControlFile
from .page_cache import bounded_mappings
from .parity import relative_error

Outputs = dict[Program, dict[str, FloatArray]]

_MAPPED_BYTES = 256 << 20  # of weights at a time
_SIDE = 12  # latents: 36 tokens, so that there are pads too
_CAPTION = 32  # tokens


@dataclass(frozen=True)
class ControlCheck:
    """What the programs gave."""

    outputs: Mapping[str, Any]  # by program, the root mean square of each output
    parity: Mapping[str, Any] | None  # by program, the largest relative error; None where it was not measured


def check_control(net: ControlNet, file: ControlFile | None) -> ControlCheck:
    """Runs every program of the CPU once; with `file`, compares with diffusers' blocks.

    Raises `ExportError` for an output that is not finite or, unless its weights are zero, constant.
    """
    config = net.manifest.config
    found = _run(net, fixed_inputs(config))
    for program, outputs in found.items():
        for name, value in outputs.items():
            if not np.isfinite(value).all():
                raise ExportError(f"self-check: {name} of {program} has values that are not finite")
    for name, value in found[Program.CONTROL_TOKENS].items():
        if np.ptp(value) == 0:
            raise ExportError(f"self-check: {name} of {Program.CONTROL_TOKENS} has the same value everywhere")
    summary = {
        program.value: {name: round(_rms(value), 6) for name, value in outputs.items()}
        for program, outputs in found.items()
    }
    return ControlCheck(summary, _parity(file, found) if file else None)


def _run(net: ControlNet, inputs: Mapping[Program, dict[str, FloatArray]]) -> Outputs:
    """Weights stay mapped and are released as they are used, so that little memory is needed at any size."""
    found: Outputs = {}
    programs, refiners = HostPrograms(net, low_memory=True), len(net.manifest.config.refiner_blocks)
    for program, feeds in inputs.items():
        if program in (Program.CONTROL_REFINER, Program.CONTROL_LAYERS):
            table = found[Program.CONTROL_MODULATION]["modulation"][0]
            rows = table[:refiners] if program is Program.CONTROL_REFINER else table[refiners:]
            feeds = {**feeds, "modulation": rows}
        programs.load(program)
        with bounded_mappings(net.root, _MAPPED_BYTES):
            found[program] = programs.run(program, feeds)
        programs.release()
    return found


def fixed_inputs(config: ControlConfig) -> dict[Program, dict[str, FloatArray]]:
    """One input for every program, the same for every ControlNet of the same dimensions; without modulation."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> FloatArray:
        return rng.standard_normal(shape, dtype=np.float32)

    image = padded((_SIDE // 2) ** 2)
    angles = normal(1, image + _CAPTION, config.head_dim // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    tokens, control = normal(1, image + _CAPTION, config.dim), normal(1, image + _CAPTION, config.dim)
    scale = np.ones(1, np.float32)
    found = {
        Program.CONTROL_TOKENS: {
            "latents": normal(1, config.channels, _SIDE, _SIDE),
            "pad_token": normal(1, config.dim),
            "image_cos": cos[:, :image],
        },
        Program.CONTROL_MODULATION: {"embedding": normal(1, config.adaln_dim)},
        Program.CONTROL_REFINER: {
            "control": control[:, :image],
            "tokens": tokens[:, :image],
            "cos": cos[:, :image],
            "sin": sin[:, :image],
            "scale": scale,
        },
        Program.CONTROL_LAYERS: {
            "control": control,
            "tokens": tokens,
            "cos": cos,
            "sin": sin,
            "scale": scale,
        },
    }
    return {program: found[program] for program in config.programs}


def _parity(file: ControlFile, found: Outputs) -> dict[str, Any]:
    """The relative error of each program's output that is farthest from diffusers'."""
    from .control_reference import embedded, run_blocks

    inputs, config = fixed_inputs(file.config), file.config
    embedding = inputs[Program.CONTROL_MODULATION]["embedding"]
    expected = {Program.CONTROL_TOKENS: embedded(file, **inputs[Program.CONTROL_TOKENS])}
    for program, names in (
        (Program.CONTROL_REFINER, config.refiner_blocks),
        (Program.CONTROL_LAYERS, config.layer_blocks),
    ):
        if program in found:
            hints = program is Program.CONTROL_LAYERS or config.refiner is Refiner.CONTROL
            expected[program] = run_blocks(file, names, inputs[program], embedding, hints=hints)
    worst = {
        program.value: max(
            relative_error(found[program][name], value) for name, value in outputs.items() if np.any(value)
        )
        for program, outputs in expected.items()
    }
    return {
        "reference": f"{file.name} with diffusers in float32",
        "executor": "cpu",
        "relative_error": {name: float(f"{error:.3g}") for name, error in worst.items()},
    }


def _rms(value: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
