"""What a row of ``results.jsonl`` contains: seconds, bytes, joules and operations per second.

A value that could not be measured is null with the reason, never 0 (`Reading`). Rows name no path of the machine.
Field names are those of the committed results and cannot change: where they say *picture* and *draw*, the rest of
the code says *image*.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from zimage_runtime.checked_json import to_document

SCHEMA = 1

OK, FAILED = "ok", "failed"

OURS = "zimage-rt"

IMPORT, LOAD, TEXT, STEP, DECODE, SAVE = "import", "load", "text", "step", "decode", "save"
STAGES = (IMPORT, LOAD, TEXT, STEP, DECODE, SAVE)
"""The stages of a process, in order: the first two once, the others for each image, `step` once per step."""


@dataclass(frozen=True)
class Reading:
    """A number, or the reason why there is none."""

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError("a reading has either a value or a reason")


def absent(reason: str) -> Reading:
    """No value, and why."""
    return Reading(None, reason)


@dataclass(frozen=True)
class Case:
    """One combination that is measured: all that decides what is computed, and how often."""

    system: str  # `OURS` or a baseline's name
    model: str  # the bundle's or checkpoint's folder name
    precision: str
    fingerprint: str  # of its files
    executor: str
    width: int
    height: int
    steps: int
    seed: int
    prompt: str
    repeat: int  # images that are measured
    warmup: int  # images before them; the first is the cold start
    low_memory: bool = False
    drop_cache: bool = False
    threads: int = 1
    vram: int | None = None  # the budget in bytes of an executor on a GPU; without one, what is free there

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT."""
        return f"{self.width}x{self.height}"

    @property
    def label(self) -> str:
        """What distinguishes cases of one size, for people."""
        name = f"{self.model} {self.executor}" if self.system == OURS else f"{self.system} {self.precision}"
        budget = "" if self.vram is None else f" in {self.vram / 2**30:.4g} GiB"
        return name + (" low-memory" if self.low_memory else "") + budget

    def key(self, setup: str) -> str:
        """Names the row: the same case on the same setup (versions, commit, machine) is not measured again."""
        document = to_document(self)
        if self.vram is None:
            del document["vram"]  # rows that were measured before there were budgets keep their keys
        text = json.dumps([document, setup], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """Seconds of one warm image. `text` and `decode` are null where a system does not report them."""

    total: float  # from the request to the file
    text: float | None
    steps: tuple[float, ...]
    decode: float | None
    save: float


@dataclass(frozen=True)
class Times:
    """Seconds of a process."""

    importing: float  # from the process's start until the libraries are imported
    loading: float  # opening the model; what is loaded lazily counts in the cold image
    cold_picture: float  # the first image
    cold_start: float  # from the process's start to the first image's file
    page_cache: str  # "warm", "dropped" or "as found": what the model's files were when the process started
    draws: tuple[Draw, ...]  # the warm images


@dataclass(frozen=True)
class StageMemory:
    """Peak memory during a stage, over all its repetitions."""

    resident: int | None = None
    anonymous: int | None = None
    mapped: int | None = None
    gpu: int | None = None


@dataclass(frozen=True)
class Memory:
    """Peaks of the process. `gpu_device` is the growth of the whole device's use, as a cross-check."""

    interval: float  # between two samples, as requested; the end of every stage is sampled too
    interval_median: Reading  # as measured
    interval_longest: Reading
    resident: Reading
    anonymous: Reading  # heap, arenas, packed weights
    mapped: Reading  # files in the page cache, which shrinks when others need memory
    gpu_process: Reading
    gpu_device: Reading
    gpu_allocator: Reading
    planned: dict[str, int]  # by program, of the memory plan
    planned_peak: Reading
    stages: dict[str, StageMemory]
    trace: tuple[tuple[float, int | None, int | None, int | None], ...]  # seconds, anonymous, mapped, GPU
    bands: tuple[tuple[str, float, float], ...]  # stage, from, to: seconds since the process's start


@dataclass(frozen=True)
class Floor:
    """What the device's own matrix rate allows. `*_rate` in operations per second, additions counted."""

    float_rate: Reading
    integer_rate: Reading
    text: Reading  # seconds
    step: Reading
    decode: Reading
    step_fraction: Reading  # floor over the median step: 1 is the floor reached


@dataclass(frozen=True)
class Accuracy:
    """How far the image is from the reference's with the same seed."""

    reference: str | None  # what generated it
    psnr_db: Reading  # also null for identical images; the reason says which
    identical: bool
    max_difference: Reading  # of a channel, in 255ths
    perceptual: Reading  # mean FLIP error, 0 to 1
    gate_db: float | None  # the least PSNR that passes
    repeatable: bool | None  # whether every image had the same pixels


@dataclass(frozen=True)
class Row:
    """One case, measured."""

    key: str
    case: Case
    status: str  # `OK` or `FAILED`
    failure: str | None
    times: Times | None  # null where images are missing
    memory: Memory | None
    floor: Floor | None
    accuracy: Accuracy | None
    energy: Reading  # joules per warm image
    conditions: dict[str, Any]  # load, clocks, temperatures and power while it ran
    environment: dict[str, Any]
    picture: str | None  # path below the results' folder
    command: str
    started: str  # UTC, ISO 8601
    schema: int = SCHEMA
    notes: tuple[str, ...] = field(default=())

    @property
    def finished(self) -> bool:
        """Whether it need not be measured again: it has images, right or wrong."""
        return self.times is not None
