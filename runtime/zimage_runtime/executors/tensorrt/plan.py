"""What is on the device at each moment, for a VRAM budget and an image: computed before anything is loaded.

Stages take turns. In each, as many blocks as fit are resident. The others are streamed through two slots, so that one
is copied while the other is computed with. Stages stay loaded between images only if all of them fit at once. If the
decoder does not fit, as many of its blocks as possible run on whole maps, and the others on tiles of maps that stay on
the host. If the encoder does not fit, it runs on the host.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...adapters.branches import RANK_UNIT
from ...bundle.manifest import Manifest
from ...errors import MemoryLimitError, RequestError
from ...model.blocks import main_blocks
from ...model.config import PATCH_SIZE, ModelConfig
from ...model.programs import Program
from ...units import gib, gib_free, gib_needed
from ..overheads import TENSORRT_CUDA
from ..plan_lines import labelled
from ..protocol import Work
from ..turns import group_size
from .block_catalog import MOST_RANK, VariantSpec
from .decoder_tiles import takes_maps, tiled_decoder
from .stage_sizes import STAGES, ImageSizes, StageNeeds, stage_needs

CONTEXT_BYTES = TENSORRT_CUDA.nbytes

SLOTS = 2

_NEEDED = (Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER)  # these cannot run on the host instead
_STREAMABLE = _NEEDED
_NO_ENGINE = "the bundle's engines do not support maps of this size"


@dataclass(frozen=True)
class StagePlan:
    """One stage on the device."""

    needs: StageNeeds
    resident: frozenset[int]  # indices of the blocks that stay
    images: int  # of a batch that pass each block together, so that a block is streamed once for all of them

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the blocks that are copied to the slots in turn."""
        return tuple(index for index in range(len(self.needs.blocks)) if index not in self.resident)

    @property
    def slot_bytes(self) -> int:
        """The size of each of the two slots."""
        return max((self.needs.block_bytes[index] for index in self.streamed), default=0)

    @property
    def weight_bytes(self) -> int:
        """Weights on the device, slots included."""
        resident = sum(self.needs.block_bytes[index] for index in self.resident)
        return resident + SLOTS * self.slot_bytes + sum(self.needs.end_bytes)

    @property
    def nbytes(self) -> int:
        """Everything that the stage allocates."""
        blocks = self.weight_bytes - sum(self.needs.end_bytes)
        return self.needs.fixed(self.images) + blocks


@dataclass(frozen=True)
class ResidencyPlan:
    """The plan for one image, or for a batch of them. Implements `Plan`."""

    work: Work
    stages: Mapping[Program, StagePlan]  # those on the device
    budget: int
    group_size: int  # images that are denoised before any is decoded, where stages take turns
    keep_all: bool = False  # whether stages stay loaded between images
    on_host: Mapping[Program, int | None] = field(default_factory=dict)
    """The stages that run on the CPU, and the smallest budget at which they run on the device; None: at no budget."""
    whole_decoder: int | None = None
    """The smallest budget at which the decoder is not tiled; None: at no budget."""

    @property
    def peak(self) -> int:
        """The most VRAM in use at any moment, with what CUDA itself needs."""
        sizes = [stage.nbytes for program, stage in self.stages.items() if program is not Program.ENCODER]
        return CONTEXT_BYTES + (sum(sizes) if self.keep_all else max(sizes))

    @property
    def group(self) -> int:
        """Images that are denoised before any is decoded."""
        return self.work.batch if self.keep_all else self.group_size

    @property
    def lora(self) -> int:
        """Bytes of LoRA's matrices, most at a time: stages have their own."""
        sizes = [stage.needs.buffers.get("lora", 0) for stage in self.stages.values()]
        return sum(sizes) if self.keep_all else max(sizes)

    @property
    def captured(self) -> bool:
        """Whether a step can be one CUDA graph: no block is streamed."""
        return not self.stages[Program.DENOISER].streamed

    @property
    def in_tiles(self) -> bool:
        """Whether the device decodes in tiles."""
        decoder = self.stages.get(Program.DECODER)
        return decoder is not None and bool(decoder.needs.tiles)

    @property
    def how_tiled(self) -> str:
        """How the image is decoded in tiles, and after how many blocks that run as a whole."""
        decoder = self.stages.get(Program.DECODER)
        return f"{self.how_decoded or ''}{'' if decoder is None else len(decoder.needs.blocks)}"

    @property
    def how_decoded(self) -> str | None:
        """How the image is decoded, and what would change that; None where the device decodes it as a whole."""
        if Program.DECODER not in self.stages:
            return f"on the CPU, in tiles; {self.why_on_host(Program.DECODER)}"
        if not self.in_tiles:
            return None
        if self.whole_decoder is None:
            return f"in tiles; {_NO_ENGINE}"
        return f"in tiles; as a whole with a budget of at least {gib_needed(self.whole_decoder, 2)}"

    def why_on_host(self, program: Program) -> str:
        """Why a stage runs on the CPU, and what would change that."""
        budget = self.on_host[program]
        if budget is None:
            return _NO_ENGINE
        return f"on the GPU with a budget of at least {gib_needed(budget, 2)}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one line each."""
        streamed = len(self.stages[Program.DENOISER].streamed)
        notes = [f"{streamed} of the transformer's blocks are streamed each step"] if streamed else []
        if how := self.how_decoded:
            notes.append(f"the image is decoded {how}")
        return tuple(notes)

    def lines(self) -> list[str]:
        """The plan for people: the peak, each stage, and how a step runs."""
        together = "all stages stay loaded" if self.keep_all else "stages take turns"
        context = f"{gib(CONTEXT_BYTES, 2)} of it {TENSORRT_CUDA.source} for CUDA itself"
        return [
            labelled("peak", f"{gib_needed(self.peak, 2)}, {context}; {together}"),
            *(labelled(program.value, self._described(program)) for program in STAGES),
            *([labelled("lora", f"{gib(self.lora, 2)} of the buffers")] if self.lora else []),
            labelled("step", "one CUDA graph" if self.captured else "block by block, copies beside computing"),
        ]

    def _described(self, program: Program) -> str:
        stage = self.stages.get(program)
        if stage is None:
            tiles = ", in tiles" if program is Program.DECODER else ""
            return f"on the CPU{tiles}; {self.why_on_host(program)}"
        count, kept = len(stage.needs.blocks), len(stage.resident)
        if stage.needs.tiles:
            mode = f"its first {count} blocks whole, the others {self.how_decoded}"
        else:
            mode = "all resident" if kept == count else f"{kept} of {count} blocks resident, {count - kept} streamed"
        buffers = stage.nbytes - stage.weight_bytes - stage.needs.scratch
        return (
            f"{gib(stage.nbytes, 2)}: weights {gib(stage.weight_bytes, 2)}, scratch {gib(stage.needs.scratch, 2)}, "
            f"buffers {gib(buffers, 2)}; {mode}"
        )

    def document(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "peak": self.peak,
            "context": CONTEXT_BYTES,
            "keep_all": self.keep_all,
            "captured": self.captured,
            "lora": self.lora,
            "stages": {
                program.value: {
                    "bytes": stage.nbytes,
                    "weights": stage.weight_bytes,
                    "scratch": stage.needs.scratch,
                    "blocks": len(stage.needs.blocks),  # of a decoder in tiles, those that work on whole maps
                    "resident": sorted(stage.resident),
                }
                for program, stage in self.stages.items()
            },
            "in_tiles": {"decoder": {"smallest_budget": self.whole_decoder}} if self.in_tiles else {},
            "on_cpu": {program.value: {"smallest_budget": nbytes} for program, nbytes in self.on_host.items()},
        }


def plan_residency(spec: VariantSpec, manifest: Manifest, work: Work, budget: int) -> ResidencyPlan:
    """The plan for a budget in bytes.

    Raises `MemoryLimitError` with the smallest budget that is enough, if this one is not.
    """
    config, rank = manifest.config, lora_rank(work)
    sizes = ImageSizes.of(work.geometry, work.tokens, work.batch, work.conditionings, rank)
    _check_tokens(spec, config, sizes)
    needs = {program: stage_needs(program, spec, config, sizes) for program in STAGES}
    room = budget - CONTEXT_BYTES
    smallest = smallest_budget(needs, sizes)
    if budget < smallest:
        raise _refusal(budget, smallest)
    stages: dict[Program, StagePlan] = {}
    on_host: dict[Program, int | None] = {}
    for program, stage in needs.items():
        if planned := _first_that_fits(program, _choices(program, stage, spec, config, sizes), sizes, room):
            stages[program] = planned
        else:
            least = [_everything(choice).nbytes for choice in _choices(program, stage, spec, config, sizes)]
            on_host[program] = CONTEXT_BYTES + min(least) if least else None
    wide = _too_wide(needs[Program.DECODER], spec, sizes)
    whole = None if wide else CONTEXT_BYTES + _everything(needs[Program.DECODER]).nbytes
    group = group_size(manifest, work.geometry)
    plan = ResidencyPlan(work, stages, budget, group, on_host=on_host, whole_decoder=whole)
    complete = set(stages) == set(needs) and not any(s.streamed or s.needs.tiles for s in stages.values())
    keep_all = complete and sum(stage.nbytes for stage in stages.values()) <= room
    return replace(plan, keep_all=keep_all)


def lora_rank(work: Work) -> int:
    """The rank that the programs of a request are run with; 0 without LoRA.

    Raises `RequestError` for LoRA that block programs do not take.
    """
    if work.branches is None:
        return 0
    instead = "use --executor cuda or cpu, or merge them into a bundle with `zimage-export build --lora`"
    if work.branch_products:
        raise RequestError(f"TensorRT's block programs take no LoKr at run time; {instead}")
    if work.branch_rank > MOST_RANK:
        raise RequestError(
            f"the LoRA of this image have a rank of {work.branch_rank} together, and TensorRT's block programs take "
            f"{MOST_RANK}; {instead}"
        )
    return max(work.branch_rank, RANK_UNIT)


def smallest_budget(needs: Mapping[Program, StageNeeds], sizes: ImageSizes) -> int:
    """The least VRAM in which every stage that needs the device can run."""
    return CONTEXT_BYTES + max(_least(needs[program], sizes.images) for program in _NEEDED)


def _least(needs: StageNeeds, images: int) -> int:
    return min(_everything(needs).nbytes, StagePlan(needs, frozenset(), images).nbytes)


def _everything(needs: StageNeeds) -> StagePlan:
    """All blocks resident."""
    return StagePlan(needs, frozenset(range(len(needs.blocks))), 1)


def plan_stage(
    program: Program, spec: VariantSpec, config: ModelConfig, sizes: ImageSizes, budget: int
) -> StagePlan | None:
    """One stage's part of the plan, which depends on no other; None where it runs on the host.

    Raises `MemoryLimitError` as `plan_residency` does.
    """
    if program is Program.DENOISER:
        _check_tokens(spec, config, sizes)
    needs = stage_needs(program, spec, config, sizes)
    if program in _NEEDED and budget < CONTEXT_BYTES + _least(needs, sizes.images):
        raise _refusal(budget, CONTEXT_BYTES + _least(needs, sizes.images))
    choices = _choices(program, needs, spec, config, sizes)
    return _first_that_fits(program, choices, sizes, budget - CONTEXT_BYTES)


def _first_that_fits(program: Program, choices: Iterable[StageNeeds], sizes: ImageSizes, room: int) -> StagePlan | None:
    streamable = program in _STREAMABLE
    plans = (_plan_stage(choice, room, sizes.images, streamable) for choice in choices)
    return next(filter(None, plans), None)


def _choices(
    program: Program, whole: StageNeeds, spec: VariantSpec, config: ModelConfig, sizes: ImageSizes
) -> Iterator[StageNeeds]:
    """How the device can run a stage, the best first: as a whole or, for the decoder, with more and more in tiles."""
    if not _too_wide(whole, spec, sizes):
        yield whole
    if program is Program.DECODER:
        for blocks in range(len(whole.blocks) - 1, -1, -1):
            if needs := tiled_decoder(spec, config, sizes, blocks):
                yield needs


def _check_tokens(spec: VariantSpec, config: ModelConfig, sizes: ImageSizes) -> None:
    """Raises `RequestError` for an image with more tokens than the engines were built for."""
    most = min(spec.program_of(place).largest for place in main_blocks(config))
    if sizes.tokens > most:
        side = math.isqrt(most - sizes.caption_tokens) * PATCH_SIZE * config.vae.scale
        raise RequestError(
            f"this image has {sizes.tokens} tokens, and the bundle's engines support {most}, about a {side}x{side} "
            "image; lower --size, or use --executor cpu"
        )


def _too_wide(needs: StageNeeds, spec: VariantSpec, sizes: ImageSizes) -> bool:
    """Whether the autoencoder's engines were built for smaller maps only."""
    blocks = [place for place in needs.blocks if place.kind.component == "vae"]
    return not takes_maps(spec, blocks, sizes)


def _refusal(budget: int, smallest: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"this image does not fit in {gib_free(budget, 2)} of VRAM: the smallest budget for it is "
        f"{gib_needed(smallest, 2)}; raise --vram, lower --size, or use --executor cpu"
    )


def _plan_stage(needs: StageNeeds, room: int, images: int, streamable: bool) -> StagePlan | None:
    count = len(needs.blocks)
    everything = _everything(needs)
    if everything.nbytes <= room:
        return everything
    if not streamable:
        return None
    low, high = 0, count  # bisects for the most blocks that fit: 0 may, all do not
    while high - low > 1:
        middle = (low + high) // 2
        if StagePlan(needs, spread(count, middle), images).nbytes <= room:
            low = middle
        else:
            high = middle
    plan = StagePlan(needs, spread(count, low), images)
    return plan if plan.nbytes <= room else None


def spread(count: int, chosen: int) -> frozenset[int]:
    """`chosen` of `count` indices, evenly spread: a resident block between two streamed ones hides a copy."""
    return frozenset(index for index in range(count) if (index + 1) * chosen // count > index * chosen // count)
