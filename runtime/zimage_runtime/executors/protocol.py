"""The border between the pipeline and what runs a bundle. numpy arrays cross it; what is large stays on the far side.

An executor plans a request before anything is loaded, then runs it in a session. Loading, freeing, tiling and streaming
are its business alone: the pipeline knows no program, no tile and no device.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ..adapters.branches import Branches
from ..arrays import FloatArray
from ..bundle.bundle import Bundle
from ..bundle.controlnet import ControlNet
from ..model.geometry import ImageGeometry, Rotary
from .examination import Examination


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a request asks of an executor: all that decides how much memory it takes."""

    geometry: ImageGeometry
    tokens: int  # of the prompt in its template; of the longer one, if there is a negative prompt
    guided: bool = False  # whether there is a negative prompt: its conditioning stays beside the prompt's
    batch: int = 1  # images that are denoised in one call
    count: int = 1  # images in all
    steps: int = 8  # of the schedule: rows of the modulation table
    encodes: bool = False  # whether there is a source image
    held: int = 0  # bytes of the host's memory that the caller keeps until the end: finished images
    branches: int | None = None  # bytes of LoRA's matrices; None where the programs need not take any
    branch_rank: int = 0  # the largest of a layer's
    branch_products: bool = False  # whether a layer has Kronecker products: LoKr
    waiting: int = 1  # requests whose conditionings are kept at once: more than one for a group of them
    control: ControlNet | None = None  # whose hints are added in some steps

    @property
    def conditionings(self) -> int:
        """Prompts that are encoded, and whose caption tokens are kept."""
        return 2 if self.guided else 1

    @property
    def kept_conditionings(self) -> int:
        """Those that are kept at once."""
        return self.conditionings * self.waiting


@dataclass(frozen=True)
class Control:
    """What a ControlNet adds, for one image and schedule."""

    net: ControlNet
    latents: FloatArray  # [1, channels, height / 8, width / 8] of the control image and what is inpainted
    pad_token: FloatArray  # [1, dim]: the model's
    scale: float  # that hints are multiplied by
    steps: frozenset[int]  # of the schedule, in which hints are added


@dataclass(frozen=True)
class Conditioning:
    """All that one prompt, size and schedule fix, before the first step."""

    hidden_states: FloatArray  # [1, tokens, hidden_size], from the text encoder
    timesteps: FloatArray  # [steps]
    image_rotary: Rotary  # [1, image_tokens, head_dim / 2]
    caption_rotary: Rotary  # [1, caption_tokens, head_dim / 2]
    branches: Branches | None = None  # LoRA; None runs programs that take none
    control: Control | None = None


class Plan(Protocol):
    """What an executor will do about memory, for one request."""

    @property
    def peak(self) -> int:
        """The most bytes held at once: of the device's memory, or on the CPU of the machine's."""

    @property
    def group(self) -> int:
        """Images that are denoised before the first of them is decoded: more than one where stages take turns."""

    @property
    def how_tiled(self) -> str:
        """How the autoencoder's maps are cut where they do not fit as a whole; empty where they do. Where plans of one
        executor differ in it, so may the last bits of an image."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one line each."""

    def lines(self) -> list[str]:
        """The plan for people, as `zimage-rt plan` prints it."""

    def document(self) -> dict[str, Any]:
        """The plan for programs: JSON's own types."""


class Denoiser(Protocol):
    """The steps of one conditioning; caption tokens and tables stay on the device for as long as it lives."""

    def __call__(self, latents: FloatArray, step: int) -> FloatArray:
        """The velocity d latents / d sigma at a step. [batch, channels, height / 8, width / 8], in and out."""


class Session(Protocol):
    """One request at work. Every method loads what it needs and may raise `ExecutorError` or `CancelledError`."""

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        """Prompt embeddings [1, tokens, hidden_size] → hidden states of the last but one layer, same shape."""

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """Refines the caption and makes the modulation table: what is done once per prompt."""

    def decode(self, latents: FloatArray) -> FloatArray:
        """Unscaled latents [batch, channels, h, w] → images [batch, 3, 8h, 8w], about -1 to 1."""

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Images [batch, 3, height, width] in -1 to 1 → mean and log-variance [batch, channels, h, w]."""

    def cancel(self) -> None:
        """Stops what is running at the next operator and everything after it with `CancelledError`. Any thread."""


@dataclass(frozen=True)
class Computation:
    """What else than bundle and request decides an image's last bits, for its metadata."""

    program: str  # which of its programs the denoiser is
    library: str  # name and version
    activation_bits: int | None = None  # of an int8 bundle's activations; None where there are none


class Executor(Protocol):
    """Runs one bundle on one device."""

    @property
    def name(self) -> str:
        """The executor's name on the command line."""

    @property
    def device_name(self) -> str:
        """What it runs on, as its maker calls it."""

    @property
    def takes_lora(self) -> bool:
        """Whether it has programs that take LoRA at run time."""

    @property
    def takes_control(self) -> bool:
        """Whether it runs steps under a ControlNet."""

    def extend(self) -> None:
        """From here on, runs the programs that take LoRA and hints, where it has any: the first request for one then
        loads nothing again."""

    def plan(self, work: Work) -> Plan:
        """How a request will run, before anything is loaded. Changes nothing.

        What this executor holds itself and would free or use again is not counted as taken. Raises `MemoryLimitError`
        where the request does not fit, `RequestError` where the programs cannot do it.
        """

    def session(self, plan: Plan) -> AbstractContextManager[Session]:
        """Runs a request as this executor planned it, on a thread of its own, so that signals reach the caller.

        When it ends, it frees what may not stay loaded: everything after an error, and whatever the plan or the
        executor's options do not keep after a normal end or a cancellation.
        """

    def computation(self, plan: Plan) -> Computation:
        """What computes a planned request."""

    def release(self) -> None:
        """Frees everything that is loaded; the next session loads it again."""

    def close(self) -> None:
        """Frees everything for good and writes caches. Safe to call twice."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an executor is opened."""

    vram: int | None = None  # bytes of GPU memory that may be used; by default what is free
    device: int = 0  # which GPU
    low_memory: bool = False  # weights on the CPU stay mapped from the file
    keep_loaded: bool = True  # what fits in memory stays loaded between requests
    trust_engines: bool = False  # load engines, which are code, that came with the bundle
    note: Callable[[str], object] = lambda text: None  # called with a line for what is done once and takes a while


@dataclass(frozen=True)
class Unavailable:
    """Why an executor cannot run a bundle here, and what to do about it."""

    reason: str
    of_machine: bool = False  # the hardware or its driver is missing, so nothing that can be installed here helps


UNLIMITED = 1 << 60
"""Bytes: a budget for plans that are to show what everything takes."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine that a plan is made for, which need not be this one."""

    memory: int  # bytes: of the GPU's memory or, for the CPU, of the machine's
    gpu: str | None = None  # a target of `zimage-export engines`, like "sm86"; None where it does not matter


@dataclass(frozen=True, kw_only=True)
class ExecutorKind:
    """What the registry knows of an executor. Heavy imports happen inside these functions."""

    on_gpu: bool
    why_unavailable: Callable[[Bundle, int], Unavailable | None]
    """Why it cannot run a bundle on a device of this machine; None where it can."""
    open: Callable[[Bundle, Options], Executor]
    """Raises `ExecutorError`."""
    predict: Callable[[Bundle, Work, Hardware], Plan]
    """The plan for another machine. Raises `MemoryLimitError`, or `BundleError` where the bundle has no programs."""
    examine: Callable[[], Examination]
    takes_control: bool = False  # runs steps under a ControlNet
    why_not_automatic: Callable[[int], Unavailable | None] = lambda device: None
    """Why `auto` does not choose it on a device of this machine, although it may run there when it is named."""
