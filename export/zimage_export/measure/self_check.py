"""The check that ends every export: each program runs once on a fixed input, and its output must be finite and vary."""

from typing import Any

import numpy as np

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.geometry import (
    SEQUENCE_MULTIPLE,
    caption_positions,
    image_geometry,
    image_positions,
    text_rotary,
    transformer_rotary,
)
from zimage_runtime.model.programs import Program

from ..errors import ExportError
from .page_cache import bounded_mappings

_MAPPED_BYTES = 256 << 20  # of weights at a time
_TOKENS = 20  # fewer than the padded caption, so that pads are exercised
_SIDE = 96  # pixels: 36 image tokens at the published scale, so that there are pads too


def self_check(bundle: Bundle) -> dict[str, Any]:
    """Runs every program and returns the root mean square of each output.

    Weights stay mapped and are released as they are used, so the check needs little memory at any size. Raises
    `ExportError` for an output that is not finite or is constant.
    """
    programs = HostPrograms(bundle, low_memory=True)
    results: dict[str, Any] = {}
    for program, feeds in fixed_inputs(bundle.manifest.config).items():
        programs.load(program)
        with bounded_mappings(bundle.root, _MAPPED_BYTES):
            outputs = programs.run(program, feeds)
        programs.release()
        for name, value in outputs.items():
            if not np.isfinite(value).all():
                raise ExportError(f"self-check: {name} of {program} has values that are not finite")
            if np.ptp(value) == 0:
                raise ExportError(f"self-check: {name} of {program} has the same value everywhere")
        results[program.value] = {name: round(_rms(value), 6) for name, value in outputs.items()}
    return results


def fixed_inputs(config: ModelConfig) -> dict[Program, dict[str, FloatArray]]:
    """One input for every program, the same for every bundle of the same dimensions."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> FloatArray:
        return rng.standard_normal(shape, dtype=np.float32)

    t, unit = config.transformer, config.vae.scale * 2
    geometry = image_geometry(-(-_SIDE // unit) * unit, -(-_SIDE // unit) * unit, config)
    text = text_rotary(_TOKENS, config.text_encoder)
    caption = transformer_rotary(caption_positions(SEQUENCE_MULTIPLE), t)
    image = transformer_rotary(image_positions(geometry, SEQUENCE_MULTIPLE), t)
    latents = normal(1, t.in_channels, geometry.latent_height, geometry.latent_width)
    hidden = normal(1, _TOKENS, t.cap_feat_dim)
    return {
        Program.TEXT_ENCODER: {"inputs_embeds": hidden, "cos": text.cos, "sin": text.sin},
        Program.CAPTION: {"hidden_states": hidden, "cos": caption.cos, "sin": caption.sin},
        Program.MODULATION: {"timesteps": np.linspace(0, 0.9, 4, dtype=np.float32)},
        Program.DENOISER: {
            "latents": latents,
            "caption": normal(1, SEQUENCE_MULTIPLE, t.dim),
            "modulation": normal(t.modulated_blocks, 4, t.dim),
            "final_scale": normal(t.dim),
            "image_cos": image.cos,
            "image_sin": image.sin,
            "caption_cos": caption.cos,
            "caption_sin": caption.sin,
        },
        Program.DECODER: {"latents": latents},
        Program.ENCODER: {"image": np.tanh(normal(1, 3, geometry.height, geometry.width))},
    }


def _rms(value: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
