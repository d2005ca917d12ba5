"""How much of a GPU's memory an image takes, computed before anything is loaded.

Programs are loaded in turn where they do not fit together. One takes its weights, in the bundle's own types, and its
activations. The factors are counted from the programs' operators and from the CPU's measured ones, at the element
sizes of the GPU. `_ALLOCATED`, `_ARENA` and `_DECODER_MAPS` were set on an H100 with a bf16 bundle of the published
width: `benchmarks/results/gpu_h100.md`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...bundle.manifest import CUDA, Manifest, Precision
from ...errors import MemoryLimitError
from ...model.config import VaeConfig
from ...model.geometry import conditioning_bytes, padded
from ...model.programs import Program
from ...tiles.tiling import TILE_VALUES, tiled_bytes, tiled_encoder_bytes
from ...units import gib, gib_free, gib_needed
from ..overheads import ORT_CUDA
from ..plan_lines import labelled
from ..protocol import UNLIMITED, Work
from ..turns import group_size
from .int8_denoiser import Capability, denoiser_programs, why_weight_only
from .other_precisions import advised, as_precision, candidates, nearer

_FLOAT = 4

_TILE_COPIES = 12  # of a tile in VRAM: itself, what is made of it, and the convolution's workspace
_TILE_COPIES_ON_HOST = 4
_LARGEST_TILE, _SMALLEST_TILE = 1 << 24, 1 << 16  # values: 64 MB, so that halos and launches do not matter

_ALLOCATED = 1.035  # of weights: CUDA rounds each matrix up to 2 MiB
_ARENA = 1.3  # of a denoiser's activations: blocks that are free and do not fit

# Live activations at a program's peak, in units of one token (or pixel) times the width named beside it
_BLOCK_WIDTHS = 17.0  # x dim, in the type that is multiplied in
_FLOAT32_WIDTHS = 3.0  # x dim: the residual stream, a norm's input and its output
_WIDENED_WEIGHTS = 2  # of the largest linear, in fp16: the one that is used, and one that is just freed
_TEXT_WIDTHS = 15.0  # x intermediate_size / 3
_TEXT_SCORES = 3.0  # x heads x tokens
_DECODER_MAPS = 4.0  # x the widest feature map at full resolution, in float32: group norms are computed in it
_ENCODER_MAPS = 5.0


@dataclass(frozen=True)
class StageVram:
    """What a program holds on the GPU. Bytes."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Weights and activations."""
        return self.weights + self.activations


@dataclass(frozen=True)
class VramPlan:
    """What is on the GPU at each moment, for one request and budget. Implements `Plan`."""

    work: Work
    budget: int  # bytes
    stages: Mapping[Program, StageVram]  # modulation runs on the host
    keep_all: bool  # whether all weights stay on the GPU between stages
    tiled: bool  # whether the image is decoded in tiles, of maps that stay on the host
    encodes_tiled: bool  # the same for the source image
    host: int  # bytes of the host's memory for that; 0 where there is nothing
    group_size: int  # images that are denoised before any is decoded, where stages take turns
    denoiser: str = CUDA  # which of an int8 bundle's two programs the denoiser is: see `int8_denoiser`
    why: str = ""  # it is another than `cuda`
    others: Mapping[Precision, int] = dataclasses.field(default_factory=dict)  # peaks of the model's other bundles
    advice: Precision | None = None  # the nearest of them to the original that fits, if nearer than this one

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        activations = max((stage.activations for stage in self.stages.values()), default=0)
        if self.keep_all:
            # the denoiser keeps its own between steps, so it may hold them beside another's
            denoiser = self.stages[Program.DENOISER].activations
            return ORT_CUDA.nbytes + sum(stage.weights for stage in self.stages.values()) + denoiser + activations
        return ORT_CUDA.nbytes + max((stage.total for stage in self.stages.values()), default=0)

    @property
    def group(self) -> int:
        """Images that are denoised before any is decoded."""
        return self.work.batch if self.keep_all else self.group_size

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one line each."""
        notes = [f"weights are widened to fp16 for each product, {self.why}"] if self.denoiser != CUDA else []
        verbs = [verb for verb, there in (("encoded", self.encodes_tiled), ("decoded", self.tiled)) if there]
        if verbs:
            what = " and ".join(verbs)
            notes.append(f"the image is {what} in tiles, which is slower: it does not fit on the GPU as a whole")
        return tuple(notes)

    def lines(self) -> list[str]:
        """For people: the peak, each stage, and what bundles of the same model in other precisions would take."""
        together = "all weights stay loaded" if self.keep_all else "stages take turns"
        context = f"{gib(ORT_CUDA.nbytes, 2)} of it {ORT_CUDA.source} for CUDA itself"
        lines = [
            labelled("peak", f"{gib_needed(self.peak, 2)}, {context}; {together}"),
            *(
                labelled(
                    program.value,
                    f"{gib(s.total, 2)}: weights {gib(s.weights, 2)}, activations {gib(s.activations, 2)}",
                )
                for program, s in self.stages.items()
            ),
            *(labelled("note", note) for note in self.notes),
        ]
        if self.others:
            peaks = "; ".join(f"{other} {self._fits(peak)}" for other, peak in self.others.items())
            lines.append(labelled("other bundles", peaks))
        if self.advice is not None:
            lines.append(labelled("advice", f"a bundle in {self.advice} also fits and is nearer to the original model"))
        return lines

    def _fits(self, peak: int) -> str:
        if self.budget == UNLIMITED:
            return gib_needed(peak, 2)
        return f"{gib_needed(peak, 2)}, {'fits' if peak <= self.budget else 'does not fit'}"

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "peak": self.peak,
            "context": ORT_CUDA.nbytes,
            "keep_all": self.keep_all,
            "tiled": self.tiled,
            "denoiser": self.denoiser,
            "stages": {
                program.value: {"bytes": stage.total, "weights": stage.weights, "activations": stage.activations}
                for program, stage in self.stages.items()
            },
            "other_bundles": {precision.value: peak for precision, peak in self.others.items()},
        }


def tile_values(budget: int, config: VaeConfig) -> int:
    """Values of a tile within a budget in bytes."""
    room = budget - ORT_CUDA.nbytes - _layer_weights(config)
    return max(min(room // (_FLOAT * _TILE_COPIES), _LARGEST_TILE), _SMALLEST_TILE)


def _layer_weights(config: VaeConfig) -> int:
    """Bytes of the weights of a layer, and of the one before."""
    return int(2 * 9 * _FLOAT * max(config.block_out_channels) ** 2)


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
    size = f"{work.geometry.width}x{work.geometry.height}"
    what, needed, other = size + (f" in batches of {work.batch}" if work.batch > 1 else ""), gib_needed(plan.peak), ""
    others = other_peaks(manifest, work, budget, capability=capability)
    if precision := advised(others, budget, capability):
        other = f"a bundle in {precision} of the same model needs about {gib_needed(others[precision])}; "
    raise MemoryLimitError(
        f"{what} needs about {needed} of GPU memory and {gib_free(budget)} is available; {other}"
        f"give --vram {needed.replace(' ', '')} where there is as much, a smaller --size, or --executor cpu"
    )


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
    """The plan for a request; one that goes over the budget, and as little as can be, where nothing fits."""
    denoisers = (denoiser,) if denoiser else denoiser_programs(manifest, capability)
    plans = [_plan(manifest, work, budget, capability, one) for one in denoisers]
    fitting = (plan for plan in plans if plan.peak <= budget)
    return next(fitting, min(plans, key=lambda plan: plan.peak))


def _plan(manifest: Manifest, work: Work, budget: int, capability: Capability | None, denoiser: str) -> VramPlan:
    weight_only = Program.DENOISER if denoiser != CUDA else None
    stages: dict[Program, StageVram] = {
        program: StageVram(_weights(program, manifest), _activations(program, manifest, work, program is weight_only))
        for program in Program
        # modulation always runs on the host
        if program is not Program.MODULATION and (work.encodes or program is not Program.ENCODER)
    }
    vae, size, host = manifest.config.vae, (work.geometry.width, work.geometry.height), 0
    values = max(tile_values(budget, vae), 3 * max(vae.block_out_channels) * (size[0] + 2))  # a row and its halos
    in_tiles = StageVram(_layer_weights(vae), _FLOAT * _TILE_COPIES * values)
    for program, on_host in ((Program.DECODER, tiled_bytes), (Program.ENCODER, tiled_encoder_bytes)):
        whole = stages[program].total if program in stages else 0
        if ORT_CUDA.nbytes + whole > budget and in_tiles.total < whole:
            stages[program] = in_tiles
            host = max(host, on_host(vae, *size) + _FLOAT * _TILE_COPIES_ON_HOST * max(values - TILE_VALUES, 0))
    tiled, encodes_tiled = (stages.get(program) is in_tiles for program in (Program.DECODER, Program.ENCODER))
    why = why_weight_only(capability) if denoiser != CUDA else ""
    group = group_size(manifest, work.geometry)
    together = VramPlan(work, budget, stages, True, tiled, encodes_tiled, host, group, denoiser, why)
    return together if together.peak <= budget else dataclasses.replace(together, keep_all=False)


def _weights(program: Program, manifest: Manifest) -> int:
    record = manifest.record(program, CUDA)
    return int(_ALLOCATED * record.weight_bytes) if record else 0


def _activations(program: Program, manifest: Manifest, work: Work, weight_only: bool) -> int:
    config, geometry, tokens, batch = manifest.config, work.geometry, work.tokens, work.batch
    # what else than 16 bits there may be is at most float32
    half = 2 if weight_only or manifest.precision in (Precision.BF16, Precision.FP16) else _FLOAT
    pixels = geometry.width * geometry.height
    if program is Program.TEXT_ENCODER:
        text = config.text_encoder
        widths = _TEXT_WIDTHS * text.intermediate_size / 3 + _TEXT_SCORES * text.num_attention_heads * tokens
        return int(_FLOAT * tokens * widths)
    if program is Program.ENCODER:
        return int(_FLOAT * pixels * config.vae.block_out_channels[0] * _ENCODER_MAPS)
    if program is Program.DECODER:
        widest = max(config.vae.block_out_channels[:2])  # the last upsampled map keeps the level's width
        return int(_FLOAT * pixels * widest * _DECODER_MAPS)
    sequence = padded(tokens) + (batch * geometry.image_tokens if program is Program.DENOISER else 0)
    extra = 0
    if program is Program.DENOISER:
        sequence += (batch - 1) * padded(tokens)
        extra = weight_only * _WIDENED_WEIGHTS * 2 * config.transformer.dim * config.transformer.ffn_dim
        extra += (work.conditionings - 1) * conditioning_bytes(config.transformer, geometry, tokens)
    widths = half * _BLOCK_WIDTHS + _FLOAT * _FLOAT32_WIDTHS
    return extra + int(_ARENA * sequence * config.transformer.dim * widths)
