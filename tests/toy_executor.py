"""A whole executor in one file: what adding one takes. It runs the CPU's programs and pretends to be a small GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import ExecutorError, MemoryLimitError
from zimage_runtime.executors.examination import Examination, Verdict
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.executors.plan_lines import labelled
from zimage_runtime.executors.protocol import (
    Computation,
    Conditioning,
    Denoiser,
    ExecutorKind,
    Hardware,
    Options,
    Plan,
    Session,
    Unavailable,
    Work,
)
from zimage_runtime.executors.worker import Stop
from zimage_runtime.model.geometry import Rotary
from zimage_runtime.model.programs import Program

MOST_PIXELS = 64 * 64
"""What the pretended GPU holds."""

LOG: list[str] = []
"""What executors of this kind did, in order."""

BROKEN: dict[str, str] = {}
"""Reasons to be unavailable, or not to open, for tests to set."""


@dataclass(frozen=True)
class ToyPlan:
    peak: int
    group: int = 2
    notes: tuple[str, ...] = ()
    how_tiled: str = ""

    def lines(self) -> list[str]:
        return [labelled("peak", f"{self.peak} bytes")]

    def document(self) -> dict[str, Any]:
        return {"peak": self.peak, "stages": {"denoiser": {"bytes": self.peak}}}


def plan(work: Work, most: int) -> ToyPlan:
    pixels = work.geometry.width * work.geometry.height
    if pixels > most:
        raise MemoryLimitError(f"{work.geometry.width}x{work.geometry.height} does not fit on the toy")
    return ToyPlan(pixels)


@dataclass
class ToyExecutor:
    bundle: Bundle
    programs: HostPrograms = field(init=False)
    name = "toy"
    device_name = "Toy 3000"
    takes_lora = False
    takes_control = False

    def __post_init__(self) -> None:
        self.programs = HostPrograms(self.bundle)
        LOG.append("open")

    def extend(self) -> None:
        LOG.append("extend")

    def plan(self, work: Work) -> ToyPlan:
        return plan(work, MOST_PIXELS)

    @contextmanager
    def session(self, plan: Plan) -> Iterator[Session]:
        yield ToySession(self.programs)
        self.release()

    def computation(self, plan: Plan) -> Computation:
        return Computation("cpu", "toy 1.0")

    def release(self) -> None:
        self.programs.release()

    def close(self) -> None:
        self.release()
        LOG.append("close")


@dataclass
class ToySession:
    programs: HostPrograms
    stop: Stop = field(default_factory=Stop)

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        feeds = {"inputs_embeds": embeddings, "cos": rotary.cos, "sin": rotary.sin}
        return self.programs.run(Program.TEXT_ENCODER, feeds, self.stop)["hidden_states"]

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        rotary = conditioning.caption_rotary
        feeds = {"hidden_states": conditioning.hidden_states, "cos": rotary.cos, "sin": rotary.sin}
        fixed = self.programs.run(Program.CAPTION, feeds) | {
            "image_cos": conditioning.image_rotary.cos,
            "image_sin": conditioning.image_rotary.sin,
            "caption_cos": rotary.cos,
            "caption_sin": rotary.sin,
        }
        table = self.programs.run(Program.MODULATION, {"timesteps": conditioning.timesteps})

        def velocity(latents: FloatArray, step: int) -> FloatArray:
            rows = {name: values[step] for name, values in table.items()}
            return self.programs.run(Program.DENOISER, {"latents": latents, **rows, **fixed}, self.stop)["velocity"]

        return velocity

    def decode(self, latents: FloatArray) -> FloatArray:
        return self.programs.run(Program.DECODER, {"latents": latents}, self.stop)["image"]

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        found = self.programs.run(Program.ENCODER, {"image": image}, self.stop)
        return found["mean"], found["logvar"]

    def cancel(self) -> None:
        self.stop.request()


def why_unavailable(bundle: Bundle, device: int) -> Unavailable | None:
    return Unavailable(BROKEN["unavailable"], of_machine=True) if "unavailable" in BROKEN else None


def open_executor(bundle: Bundle, options: Options) -> ToyExecutor:
    if "open" in BROKEN:
        raise ExecutorError(BROKEN["open"])
    return ToyExecutor(bundle)


def predict(bundle: Bundle, work: Work, hardware: Hardware) -> ToyPlan:
    return plan(work, hardware.memory)


def examine() -> Examination:
    return Examination(Verdict.OK, "Toy 3000 computes", {"toy": True})


KIND = ExecutorKind(on_gpu=True, why_unavailable=why_unavailable, open=open_executor, predict=predict, examine=examine)
