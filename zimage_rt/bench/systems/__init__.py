"""The systems that are measured. A new one is a file with a class that has `System`'s members, and a line in `_HOMES`.

A system generates the case's image (its prompt, size, steps and seed) and reports the end of each stage; time, memory
and accuracy are measured by the runner.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zimage_runtime.errors import RequestError
from zimage_runtime.model.config import ModelConfig

from ..job import WorkerJob
from ..schema import OURS

if TYPE_CHECKING:
    from PIL.Image import Image


class Mark(Protocol):
    """Reports that a stage of `schema.STAGES` ended."""

    def __call__(self, stage: str, ended: float | None = None) -> None:
        """Now, or at `ended` on time.monotonic."""


class Model(Protocol):
    """A loaded model."""

    def generate(self, mark: Mark) -> "Image":
        """One image; marks TEXT, each STEP and DECODE as they end, or those that the system reports."""

    def on_gpu(self) -> bool | None:
        """Whether it runs on a GPU; None where that is unknown."""

    def gpu_allocated(self) -> int | None:
        """The peak of its own GPU allocator in bytes; None where it has none or does not report it."""

    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know, one line each."""


class System(Protocol):
    """A way to generate images with Z-Image."""

    packages: tuple[str, ...]  # whose versions belong to a result
    precision: str  # of a baseline; ours is the bundle's

    def obstacle(self, config: ModelConfig) -> str | None:
        """Why it cannot run a model of these dimensions here, and what to do; None where it can."""

    def convert(self, model: Path, work: Path) -> Path:
        """What to load instead of `model`, made in the folder `work` before anything is measured; or `model` itself."""

    def prepare(self) -> None:
        """Imports its libraries, in the measured process."""

    def load(self, job: WorkerJob) -> Model:
        """Opens `job.model`."""


_HOMES: dict[str, tuple[str, str]] = {
    OURS: ("ours", "Ours"),
    "diffusers": ("diffusers_pipeline", "Eager"),
    "diffusers-bf16": ("diffusers_pipeline", "EagerBf16"),
    "diffusers-compiled": ("diffusers_pipeline", "Compiled"),
    "diffusers-streamed": ("diffusers_pipeline", "Streamed"),
    "diffusers-offload": ("diffusers_pipeline", "Offloaded"),
    "openvino-genai": ("openvino_genai", "OpenVino"),
    "openvino-genai-int8": ("openvino_genai", "OpenVinoInt8"),
    "stable-diffusion.cpp": ("stable_diffusion_cpp", "StableDiffusionCpp"),
}

REFERENCE = "diffusers"
"""The baseline whose float32 image is the reference."""

STREAMED_REFERENCE = "diffusers-streamed"
"""The same, for checkpoints that do not fit in memory."""

BASELINES = tuple(name for name in _HOMES if name not in (OURS, STREAMED_REFERENCE))


def find_system(name: str) -> System:
    """The system of a name. Raises `RequestError` for an unknown one."""
    if name not in _HOMES:
        raise RequestError(f"baseline {name!r} is unknown; choose from {', '.join(BASELINES)}")
    module, maker = _HOMES[name]
    make: Callable[[], System] = getattr(import_module(f"{__name__}.{module}"), maker)
    return make()
