"""What the programs for CUDA take of a GPU's memory.

The factors are counted from the programs' operators and from the CPU's measured ones, at the element sizes of the GPU.
What `benchmarks/gpu_cuda.py` measured on an H100 with bf16 weights of the published shapes set `_ALLOCATED`, `_ARENA`
and `_DECODER_MAPS`: `benchmarks/results/gpu_h100.md`.
"""

import dataclasses
from dataclasses import dataclass

from ...bundle.manifest import CUDA, Manifest, Precision
from ...errors import MemoryLimitError
from ...model.config import ModelConfig
from ...model.geometry import conditioning_bytes
from ...model.programs import CONTROL_PROGRAMS, Program
from ...units import gib_needed
from ..overheads import ORT_CUDA
from ..protocol import UNLIMITED, Work
from .control_memory import hint_bytes, kept_bytes, tokens_of
from .control_programs import FOLLOWING
from .device_plan import FLOAT, VramPlan, best_plan, refusal
from .int8_denoiser import Capability, denoiser_programs, why_weight_only
from .other_precisions import advised, as_precision, candidates, nearer

_ALLOCATED = 1.035  # of weights: CUDA rounds each matrix up to 2 MiB
_ARENA = 1.3  # of a denoiser's activations: blocks that are free and do not fit
_EXTENDED = 2  # of values that no session owns: their allocator's regions double in size (`bfc_arena.cc`)

# Live activations at a program's peak, in units of one token (or pixel) times the width named beside it
_BLOCK_WIDTHS = 17.0  # x dim, in the type that is multiplied in
_FLOAT32_WIDTHS = 3.0  # x dim: the residual stream, a norm's input and its output
_WIDENED_WEIGHTS = 2  # of the largest linear, in fp16: the one that is used, and one that is just freed
_TEXT_WIDTHS = 15.0  # x intermediate_size / 3
_TEXT_SCORES = 3.0  # x heads x tokens
_DECODER_MAPS = 4.0  # x the widest feature map at full resolution, in float32: group norms are computed in it
_ENCODER_MAPS = 5.0


_HINT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class CudaCosts:
    """What a bundle's programs take on a GPU of a compute capability. Implements `DeviceCosts`."""

    denoisers: tuple[str, ...]
    capability: Capability | None = None

    executor = CUDA
    overhead = ORT_CUDA
    allocated = _ALLOCATED
    keeps_buffers = False  # the arena gives back what a run took; the denoiser keeps it between steps

    def activations(self, program: Program, manifest: Manifest, work: Work, denoiser: str) -> int:
        config, geometry, tokens = manifest.config, work.geometry, work.tokens
        owner = work.control.manifest if work.control and program in CONTROL_PROGRAMS else manifest
        weight_only = program in FOLLOWING and denoiser != CUDA and owner.precision is Precision.INT8
        # what else than 16 bits there may be is at most float32
        half = 2 if weight_only or owner.precision in (Precision.BF16, Precision.FP16) else FLOAT
        pixels = geometry.width * geometry.height
        if program is Program.TEXT_ENCODER:
            text = config.text_encoder
            widths = _TEXT_WIDTHS * text.intermediate_size / 3 + _TEXT_SCORES * text.num_attention_heads * tokens
            return int(FLOAT * tokens * widths)
        if program is Program.ENCODER:
            return int(FLOAT * pixels * config.vae.block_out_channels[0] * _ENCODER_MAPS)
        if program is Program.DECODER:
            widest = max(config.vae.block_out_channels[:2])  # the last upsampled map keeps the level's width
            return int(FLOAT * pixels * widest * _DECODER_MAPS)
        sequence = tokens_of(program, work)
        extra = weight_only * _WIDENED_WEIGHTS * 2 * config.transformer.dim * config.transformer.ffn_dim
        if program is Program.DENOISER:
            extra += _EXTENDED * _own_values(config, work)
        widths = half * _BLOCK_WIDTHS + FLOAT * _FLOAT32_WIDTHS
        return extra + int(_ARENA * sequence * config.transformer.dim * widths)

    def hints(self, work: Work) -> int:
        return _EXTENDED * (hint_bytes(work, _HINT_BYTES) + kept_bytes(work))

    def needs_tiles(self, program: Program, manifest: Manifest, work: Work) -> bool:
        return False

    def denoiser_note(self, denoiser: str) -> str:
        if denoiser == CUDA:
            return ""
        return f"weights are widened to fp16 for each product, {why_weight_only(self.capability)}"


def _own_values(config: ModelConfig, work: Work) -> int:
    """Bytes of what the executor itself keeps on the GPU for all steps, outside every session's arena and its limit:
    each prompt's caption tokens and rotary tables, the modulation table, latents and velocity."""
    transformer, geometry = config.transformer, work.geometry
    rows = 4 * (transformer.n_layers + transformer.n_refiner_layers) + 1
    table = FLOAT * work.steps * rows * transformer.dim
    latents = FLOAT * work.batch * config.vae.latent_channels * geometry.latent_width * geometry.latent_height
    return work.kept_conditionings * conditioning_bytes(transformer, geometry, work.tokens) + table + 2 * latents


def plan_vram(
    manifest: Manifest, work: Work, budget: int, *, capability: Capability | None = None, denoiser: str | None = None
) -> VramPlan:
    """The plan for a request within `budget` bytes, on a GPU of a compute capability. Nothing is loaded or looked up.

    `denoiser` fixes which of an int8 bundle's two programs that is; without it, the better one that fits.

    Raises `MemoryLimitError` where even one stage at a time does not fit, naming the smallest budget that would, and
    a bundle of the same model that fits, if there can be one.
    """
    plan = _best(manifest, work, budget, capability, denoiser)
    if plan.peak <= budget:
        return plan
    others = other_peaks(manifest, work, budget, capability=capability)
    precision = advised(others, budget, capability)
    if precision is None:
        raise MemoryLimitError(refusal(plan))
    other = f"a bundle in {precision} of the same model needs about {gib_needed(others[precision])}"
    raise MemoryLimitError(refusal(plan, other))


def predict_vram(manifest: Manifest, work: Work, budget: int, capability: Capability | None) -> VramPlan:
    """As `plan_vram`, together with what bundles of the same model in other precisions would take."""
    plan = plan_vram(manifest, work, budget, capability=capability)
    others = other_peaks(manifest, work, budget, capability=capability)
    best = advised({**others, manifest.precision: plan.peak}, budget, capability)
    advice = best if budget != UNLIMITED and best is not None and nearer(best, manifest.precision) else None
    return dataclasses.replace(plan, others=others, advice=advice)


def other_peaks(
    manifest: Manifest, work: Work, budget: int, *, capability: Capability | None = None
) -> dict[Precision, int]:
    """What bundles of the same model in other precisions would take of the budget, or go over it, in bytes."""
    others = (precision for precision in candidates(capability) if precision is not manifest.precision)
    return {one: _best(as_precision(manifest, one), work, budget, capability).peak for one in others}


def _best(
    manifest: Manifest, work: Work, budget: int, capability: Capability | None, denoiser: str | None = None
) -> VramPlan:
    denoisers = (denoiser,) if denoiser else denoiser_programs(manifest, capability)
    return best_plan(CudaCosts(denoisers, capability), manifest, work, budget)
