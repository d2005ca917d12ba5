"""How much of a GPU's memory an image takes, computed before anything is loaded, whatever the provider.

Programs are loaded in turn where they do not fit together. One takes its weights, in the bundle's own types, and its
activations, which each executor knows of its own programs (`DeviceCosts`).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...bundle.manifest import CUDA, Manifest, Precision
from ...model.config import VaeConfig
from ...model.programs import Program
from ...tiles.tiling import TILE_VALUES, tiled_bytes, tiled_encoder_bytes
from ...units import gib, gib_free, gib_needed
from ..overheads import Overhead
from ..plan_lines import labelled
from ..protocol import UNLIMITED, Work
from ..turns import group_size, together
from .control_memory import programs_of, weight_bytes

FLOAT = 4

_TILE_COPIES = 12  # of a tile in VRAM: itself, what is made of it, and the convolution's workspace
_TILE_COPIES_ON_HOST = 4
_LARGEST_TILE, _SMALLEST_TILE = 1 << 24, 1 << 16  # values: 64 MB, so that halos and launches do not matter


_ON_HOST = (Program.MODULATION, Program.TIMESTEP, Program.CONTROL_MODULATION)
"""The programs that always run on the host."""


class DeviceCosts(Protocol):
    """What the programs of an executor take of a device, and what may not be run there as a whole."""

    @property
    def executor(self) -> str:
        """Whose programs they are."""

    @property
    def overhead(self) -> Overhead:
        """What the library and the driver take besides."""

    @property
    def allocated(self) -> float:
        """Bytes that the device gives away for a byte of weights."""

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The names under which the denoiser's programs are, the better one first."""

    @property
    def keeps_buffers(self) -> bool:
        """Whether each loaded program keeps what its last run took; else the denoiser alone does, between steps."""

    def activations(self, program: Program, manifest: Manifest, work: Work, denoiser: str) -> int:
        """Bytes that a run of a program takes beside the weights. `denoiser` is which program that is."""

    def hints(self, work: Work) -> int:
        """Bytes of what a ControlNet adds to the tokens in a step, and of what it keeps for all steps."""

    def needs_tiles(self, program: Program, manifest: Manifest, work: Work) -> bool:
        """Whether the decoder or encoder cannot run on whole maps of a size, however much memory there is."""

    def denoiser_note(self, denoiser: str) -> str:
        """What the user should know of a denoiser's program; empty where there is nothing."""


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
    overhead: Overhead
    stages: Mapping[Program, StageVram]  # modulation runs on the host
    keep_all: bool  # whether all weights stay on the GPU between stages
    tiled: bool  # whether the image is decoded in tiles, of maps that stay on the host
    encodes_tiled: bool  # the same for the source image
    host: int  # bytes of the host's memory for that; 0 where there is nothing
    group_size: int  # images that are denoised before any is decoded, where stages take turns
    denoiser: str = CUDA  # the name under which the denoiser's program is
    denoiser_note: str = ""
    keeps_buffers: bool = False
    hints: int = 0  # bytes that a ControlNet adds to the tokens in a step, and that it keeps for all steps
    others: Mapping[Precision, int] = dataclasses.field(default_factory=dict)  # peaks of the model's other bundles
    advice: Precision | None = None  # the nearest of them to the original that fits, if nearer than this one

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        groups = [list(self.stages)] if self.keep_all else together(self.stages)
        return self._beside + max((self._held(group) for group in groups), default=0)

    def _held(self, group: list[Program]) -> int:
        """What programs hold that stay loaded beside each other, one of which runs."""
        activations = [self.stages[program].activations for program in group]
        weights = sum(self.stages[program].weights for program in group)
        if self.keeps_buffers:
            return weights + sum(activations)
        # the denoiser keeps its own between steps, so it may hold them beside another's
        between = self.stages[Program.DENOISER].activations if Program.DENOISER in group and len(group) > 1 else 0
        return weights + between + max(activations)

    @property
    def room(self) -> int:
        """Bytes of the budget beside the overhead."""
        return self.budget - self._beside

    @property
    def _beside(self) -> int:
        """What is held beside any stage: the library, the driver, LoRA's matrices, and what a ControlNet gives."""
        return self.overhead.nbytes + (self.work.branches or 0) + self.hints

    @property
    def group(self) -> int:
        """Images that are denoised before any is decoded."""
        return self.work.batch if self.keep_all else self.group_size

    @property
    def how_tiled(self) -> str:
        """Which of the autoencoder's halves run in tiles, and what a tile may take, which decides its size."""
        halves = f"{'encoder ' * self.encodes_tiled}{'decoder ' * self.tiled}"
        return f"{halves}in {self.room} bytes" if halves else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one line each."""
        notes = [self.denoiser_note] if self.denoiser_note else []
        verbs = [verb for verb, there in (("encoded", self.encodes_tiled), ("decoded", self.tiled)) if there]
        if verbs:
            what = " and ".join(verbs)
            notes.append(f"the image is {what} in tiles, which is slower: it does not fit on the GPU as a whole")
        return tuple(notes)

    def lines(self) -> list[str]:
        """For people: the peak, each stage, and what bundles of the same model in other precisions would take."""
        together = "all weights stay loaded" if self.keep_all else "stages take turns"
        context = f"{gib(self.overhead.nbytes, 2)} of it {self.overhead.source} for {self.overhead.what}"
        lines = [
            labelled("peak", f"{gib_needed(self.peak, 2)}, {context}; {together}"),
            *(
                labelled(
                    program.value,
                    f"{gib(s.total, 2)}: weights {gib(s.weights, 2)}, activations {gib(s.activations, 2)}",
                )
                for program, s in self.stages.items()
            ),
            *([labelled("lora", gib_needed(self.work.branches, 2))] if self.work.branches else []),
            *([labelled("hints", gib_needed(self.hints, 2))] if self.hints else []),
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
            "context": self.overhead.nbytes,
            "keep_all": self.keep_all,
            "tiled": self.tiled,
            "denoiser": self.denoiser,
            "lora": self.work.branches or 0,
            "hints": self.hints,
            "stages": {
                program.value: {"bytes": stage.total, "weights": stage.weights, "activations": stage.activations}
                for program, stage in self.stages.items()
            },
            "other_bundles": {precision.value: peak for precision, peak in self.others.items()},
        }


def tile_values(room: int, config: VaeConfig) -> int:
    """Values of a tile within so many bytes."""
    return max(min((room - _layer_weights(config)) // (FLOAT * _TILE_COPIES), _LARGEST_TILE), _SMALLEST_TILE)


def _layer_weights(config: VaeConfig) -> int:
    """Bytes of the weights of a layer, and of the one before."""
    return int(2 * 9 * FLOAT * max(config.block_out_channels) ** 2)


def best_plan(costs: DeviceCosts, manifest: Manifest, work: Work, budget: int) -> VramPlan:
    """The plan for a request; one that goes over the budget, and as little as can be, where nothing fits."""
    plans = [_plan(costs, manifest, work, budget, one) for one in costs.denoisers]
    fitting = (plan for plan in plans if plan.peak <= budget)
    return next(fitting, min(plans, key=lambda plan: plan.peak))


def refusal(plan: VramPlan, *advice: str, smaller: bool = True) -> str:
    """Why a plan that goes over its budget is not carried out: what it needs, what there is, and what to do.

    `smaller` is False where no size fits.
    """
    work, needed = plan.work, gib_needed(plan.peak)
    what = f"{work.geometry.width}x{work.geometry.height}"
    what += f" in batches of {work.batch}" if work.batch > 1 else ""
    return "; ".join(
        [
            f"{what} needs about {needed} of GPU memory and {gib_free(plan.budget)} is available",
            *advice,
            f"give --vram {needed.replace(' ', '')} where there is as much, {'a smaller --size, ' * smaller}"
            "or --executor cpu",
        ]
    )


def _plan(costs: DeviceCosts, manifest: Manifest, work: Work, budget: int, denoiser: str) -> VramPlan:
    stages: dict[Program, StageVram] = {
        program: StageVram(
            int(costs.allocated * weight_bytes(program, manifest, work, costs.executor, denoiser)),
            costs.activations(program, manifest, work, denoiser),
        )
        for program in programs_of(work)
        if program not in _ON_HOST
    }
    hints = costs.hints(work)
    vae, size, host = manifest.config.vae, (work.geometry.width, work.geometry.height), 0
    room = budget - costs.overhead.nbytes - (work.branches or 0) - hints
    values = max(tile_values(room, vae), 3 * max(vae.block_out_channels) * (size[0] + 2))  # a row and its halos
    in_tiles = StageVram(_layer_weights(vae), FLOAT * _TILE_COPIES * values)
    for program, on_host in ((Program.DECODER, tiled_bytes), (Program.ENCODER, tiled_encoder_bytes)):
        if program not in stages:
            continue
        whole = stages[program].total
        if (whole > room and in_tiles.total < whole) or costs.needs_tiles(program, manifest, work):
            stages[program] = in_tiles
            host = max(host, on_host(vae, *size) + FLOAT * _TILE_COPIES_ON_HOST * max(values - TILE_VALUES, 0))
    tiled, encodes_tiled = (stages.get(program) is in_tiles for program in (Program.DECODER, Program.ENCODER))
    together = VramPlan(
        work=work,
        budget=budget,
        overhead=costs.overhead,
        stages=stages,
        keep_all=True,
        tiled=tiled,
        encodes_tiled=encodes_tiled,
        host=host,
        group_size=group_size(manifest, work.geometry),
        denoiser=denoiser,
        denoiser_note=costs.denoiser_note(denoiser),
        keeps_buffers=costs.keeps_buffers,
        hints=hints,
    )
    return together if together.peak <= budget else dataclasses.replace(together, keep_all=False)
