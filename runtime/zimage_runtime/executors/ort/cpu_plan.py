"""How much of the machine's memory an image takes on the CPU, computed before anything is loaded.

Stages are loaded in turn, so the peak is the largest stage's, not the sum. A stage takes its weights (mapped from
the file; once more where ONNX Runtime packs them for speed) and its activations, which the token count decides.
The factors were measured with `benchmarks/memory_model.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...bundle.manifest import Manifest, Precision
from ...errors import MemoryLimitError, RequestError
from ...machine.host_memory import available_memory
from ...model.geometry import conditioning_bytes, image_geometry, padded
from ...model.programs import CONTROL_PROGRAMS, Program
from ...tiles.tiling import tiled_bytes, tiled_encoder_bytes
from ...units import gib, gib_free, gib_needed
from ..overheads import PROCESS
from ..plan_lines import labelled
from ..protocol import Work
from ..turns import group_size, together
from .control_memory import hint_bytes, kept_bytes, programs_of, tokens_of, weight_bytes

_FLOAT = 4  # bytes

# Live activations at a program's peak, in units of one token (or pixel) times the width named beside it
_DENOISER_WIDTHS = 17.0  # x dim
_EMBEDDED_WIDTHS = 4.0  # x dim, where tokens are only embedded
_TEXT_WIDTHS = 15.0  # x intermediate_size / 3
_TEXT_SCORES = 3.0  # x heads x tokens: causal attention holds its scores
_DECODER_MAPS = 4.5  # x the widest feature map at full resolution
_ENCODER_MAPS = 4.5  # x the feature map at full resolution

# Copies of the weights that ONNX Runtime makes at load, low memory or not: convolutions get another layout
_DECODER_WEIGHTS = 1.75
_ENCODER_WEIGHTS = 1.25

_WITH_BLOCKS = (
    *(Program.DENOISER, Program.CAPTION, Program.REFINERS),
    *(Program.CONTROL_REFINER, Program.CONTROL_LAYERS),
)

_WIDENED = (Precision.BF16, Precision.FP16, Precision.INT4)  # what is computed in float32 where it is not packed


@dataclass(frozen=True)
class MemoryPlan:
    """What each program will take, and whether all of them may stay loaded at once. Bytes. Implements `Plan`."""

    work: Work
    programs: Mapping[Program, int]  # weights and activations
    available: int  # to this process now, what it would use again included
    low_memory: bool
    group_size: int  # images that are denoised before any is decoded, where stages take turns
    tiled: bool = False  # whether the image is decoded in tiles, because the decoder as one program does not fit
    encodes_tiled: bool = False  # the same for the source image
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The most that is held at once when each stage is freed before the next is loaded."""
        groups = (sum(self.programs[program] for program in group) for group in together(self.programs))
        return PROCESS.nbytes + self._beside + max(groups)

    @property
    def keep_all(self) -> bool:
        """Whether every program may stay loaded."""
        return PROCESS.nbytes + self._beside + sum(self.programs.values()) <= self.available

    @property
    def _beside(self) -> int:
        """What is held beside any program: finished images, LoRA's matrices, and what a ControlNet gives."""
        return _beside(self.work)

    @property
    def hints(self) -> int:
        """Bytes that a ControlNet adds to the tokens in a step, and what it keeps for all steps."""
        return hint_bytes(self.work) + kept_bytes(self.work)

    @property
    def group(self) -> int:
        """Images that are denoised before any is decoded."""
        return self.work.batch if self.keep_all else self.group_size

    @property
    def how_tiled(self) -> str:
        """Which of the autoencoder's halves run in tiles."""
        return f"{'encoder ' * self.encodes_tiled}{'decoder' * self.tiled}"

    def lines(self) -> list[str]:
        """For people: the peak, then each program."""
        together = "all programs stay loaded" if self.keep_all else "programs take turns"
        tiles = {Program.DECODER: self.tiled, Program.ENCODER: self.encodes_tiled}
        return [
            labelled(
                "peak",
                f"{gib_needed(self.peak, 2)} of memory, {gib(PROCESS.nbytes, 2)} of it before any program; {together}",
            ),
            *(
                labelled(program.value, gib_needed(size, 2) + (", in tiles" if tiles.get(program) else ""))
                for program, size in self.programs.items()
            ),
            *([labelled("lora", gib_needed(self.work.branches, 2))] if self.work.branches else []),
            *([labelled("hints", gib_needed(self.hints, 2))] if self.hints else []),
            *(labelled("note", note) for note in self.notes),
        ]

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "peak": self.peak,
            "available": self.available,
            "keep_all": self.keep_all,
            "low_memory": self.low_memory,
            "tiled": self.tiled,
            "lora": self.work.branches or 0,
            "hints": self.hints,
            "stages": {program.value: {"bytes": size} for program, size in self.programs.items()},
        }


def plan_memory(
    manifest: Manifest, work: Work, *, low_memory: bool = False, available: int | None = None, reusable: int = 0
) -> MemoryPlan:
    """The plan for a request. `reusable` bytes are held by programs that the executor would free or use again.

    An image is decoded or encoded in tiles only where the decoder or encoder as one program does not fit.
    Raises `MemoryLimitError` where the peak is more than what is available, naming the largest size that fits.
    """
    limit = available_memory() + reusable if available is None else available
    plan = _plan(manifest, work, low_memory, limit)
    if plan.peak > limit:
        raise MemoryLimitError(_refusal(manifest, plan))
    return plan


def _plan(manifest: Manifest, work: Work, low_memory: bool, limit: int) -> MemoryPlan:
    programs = {}
    for program in programs_of(work):
        # packed copies are what a program cannot do without; mapped weights are the page cache's, which yields
        copies = {Program.DECODER: _DECODER_WEIGHTS, Program.ENCODER: _ENCODER_WEIGHTS}.get(program, not low_memory)
        programs[program] = int(weight_bytes(program, manifest, work) * copies) + _activations(program, manifest, work)
        owner = work.control.manifest if work.control and program in CONTROL_PROGRAMS else manifest
        if low_memory and owner.precision in _WIDENED:
            programs[program] += _widened_bytes(program, manifest)
    tiled = set()
    for program, size in ((Program.DECODER, tiled_bytes), (Program.ENCODER, tiled_encoder_bytes)):
        in_tiles = size(manifest.config.vae, work.geometry.width, work.geometry.height)
        whole = programs.get(program, 0)
        if PROCESS.nbytes + _beside(work) + whole > limit and in_tiles < whole:
            programs[program] = in_tiles
            tiled.add(program)
    group = group_size(manifest, work.geometry)
    return MemoryPlan(work, programs, limit, low_memory, group, Program.DECODER in tiled, Program.ENCODER in tiled)


def _beside(work: Work) -> int:
    return work.held + (work.branches or 0) + hint_bytes(work) + kept_bytes(work)


def _widened_bytes(program: Program, manifest: Manifest) -> int:
    """Narrow weights that are in float32 at once where they stay mapped: one layer's largest, and the one before."""
    config = manifest.config
    if program is Program.TEXT_ENCODER:
        return 2 * _FLOAT * config.text_encoder.hidden_size * config.text_encoder.intermediate_size
    if program in _WITH_BLOCKS:
        return 2 * _FLOAT * config.transformer.dim * config.transformer.ffn_dim
    return 0


def _activations(program: Program, manifest: Manifest, work: Work) -> int:
    config, geometry, tokens = manifest.config, work.geometry, work.tokens
    if program is Program.TEXT_ENCODER:
        text = config.text_encoder
        widths = _TEXT_WIDTHS * text.intermediate_size / 3 + _TEXT_SCORES * text.num_attention_heads * tokens
        return int(_FLOAT * tokens * widths)
    if program is Program.DENOISER:
        sequence = work.batch * (geometry.image_tokens + padded(tokens))
        second = (work.kept_conditionings - 1) * conditioning_bytes(config.transformer, geometry, tokens)
        return second + int(_FLOAT * sequence * _DENOISER_WIDTHS * config.transformer.dim)
    if program is Program.ENCODER:
        pixels = geometry.width * geometry.height
        return int(_FLOAT * pixels * config.vae.block_out_channels[0] * _ENCODER_MAPS)
    if program is Program.DECODER:
        channels = config.vae.block_out_channels
        widest = max(channels[0], channels[min(1, len(channels) - 1)])  # the last upsampled map keeps the level's width
        return int(_FLOAT * geometry.width * geometry.height * widest * _DECODER_MAPS)
    widths = _EMBEDDED_WIDTHS if program in (Program.TOKENS, Program.CONTROL_TOKENS) else _DENOISER_WIDTHS
    values = widths * tokens_of(program, work) * config.transformer.dim
    # the library's own hints, beside the copies that are given to the denoiser
    return int(_FLOAT * values) + (hint_bytes(work) if program is Program.CONTROL_LAYERS else 0)


def _refusal(manifest: Manifest, plan: MemoryPlan) -> str:
    work = plan.work
    asked = (
        f"{work.geometry.width}x{work.geometry.height}"
        + (f" in batches of {work.batch}" if work.batch > 1 else "")
        + f" needs about {gib_needed(plan.peak)} of memory and {gib_free(plan.available)} is available"
    )
    advice = []
    if work.held:
        advice.append(f"{gib_needed(work.held, 2)} of it is for {work.count} finished images: stream them instead")
    if largest := largest_size(manifest, work, lambda other: _fits(manifest, other, plan, low_memory=plan.low_memory)):
        advice.append(f"the largest size of this shape that fits is {largest}")
    if not plan.low_memory and _fits(manifest, work, plan, low_memory=True):
        advice.append("it fits with --low-memory")
    return f"{asked}; {'; '.join(advice) or 'no size fits: close other programs or use a smaller bundle'}"


def _fits(manifest: Manifest, work: Work, plan: MemoryPlan, *, low_memory: bool) -> bool:
    """Whether another request for the same memory fits."""
    return _plan(manifest, work, low_memory, plan.available).peak <= plan.available


def largest_size(manifest: Manifest, work: Work, fits: Callable[[Work], bool]) -> str | None:
    """The largest size below that of a request, of about its shape, of which `fits` is true; None where none is."""
    unit, sides = manifest.config.vae.scale * 2, (work.geometry.width, work.geometry.height)
    longest = max(sides) // unit
    for side in range(longest - 1, 0, -1):
        width, height = (max(round(pixels / unit * side / longest), 1) * unit for pixels in sides)
        try:
            smaller = image_geometry(width, height, manifest.config)
        except RequestError:
            continue
        if fits(replace(work, geometry=smaller)):
            return f"{width}x{height}"
    return None


def check_host(work: Work, maps: int) -> None:
    """Checks the host's memory for a request that runs on a GPU: `maps` bytes that tiles are cut from, and what the
    caller holds. Raises `MemoryLimitError`.
    """
    available = available_memory()
    size = f"{work.geometry.width}x{work.geometry.height}"
    if maps and maps + work.held > available:
        raise MemoryLimitError(
            f"{size} does not fit on the GPU, and in tiles it needs {gib_needed(maps + work.held)} of memory, of which "
            f"{gib_free(available)} is available; choose a smaller --size"
        )
    if work.held > available:
        raise MemoryLimitError(
            f"{work.count} finished images of {size} need {gib_needed(work.held)} of memory and {gib_free(available)} "
            "is available; stream them instead"
        )
