"""zimage-rt itself, through its Python API."""

from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runtime.bundle.manifest import CPU
from zimage_runtime.model.config import ModelConfig

from ..job import WorkerJob
from ..schema import DECODE, STEP, TEXT
from . import Mark

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_runtime.pipeline import Pipeline


class Ours:
    """A bundle and an executor; `job.case.precision` is the bundle's."""

    packages: tuple[str, ...] = ("zimage-rt", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy")
    precision = "the bundle's"

    def obstacle(self, config: ModelConfig) -> str | None:
        """None: the runner opens each bundle before it starts."""
        return None

    def convert(self, model: Path, work: Path) -> Path:
        """The model as it is."""
        return model

    def prepare(self) -> None:
        """Imports what a first image needs."""
        import numpy  # noqa: F401
        import onnxruntime  # noqa: F401
        import PIL.Image  # noqa: F401

        import zimage_runtime.pipeline  # noqa: F401

    def load(self, job: WorkerJob) -> "OurModel":
        """Opens the bundle. Programs are loaded when they are first used: with the cold image."""
        from zimage_runtime.pipeline import Pipeline

        case = job.case
        return OurModel(Pipeline.from_bundle(job.model, case.executor, case.vram, low_memory=case.low_memory), job)


class OurModel:
    """A pipeline that keeps loaded what fits."""

    def __init__(self, pipeline: "Pipeline", job: WorkerJob) -> None:
        self._pipeline, self._case = pipeline, job.case

    def generate(self, mark: Mark) -> "Image":
        """One image, by the pipeline's own events."""
        from zimage_runtime.pipeline import CaptionEvent, ImageEvent, StepEvent

        case, image = self._case, None
        self._pipeline.forget_prompt()  # as other systems do, every image encodes its prompt
        for event in self._pipeline.stream(
            case.prompt, size=(case.width, case.height), steps=case.steps, seed=case.seed
        ):
            match event:
                case CaptionEvent():
                    mark(TEXT)
                case StepEvent():
                    mark(STEP)
                case ImageEvent():
                    mark(DECODE)
                    image = event.image
        assert image is not None, "a pipeline ends with an image or an error"
        return image

    def on_gpu(self) -> bool:
        """Every executor but `cpu` does."""
        return self._case.executor != CPU

    def gpu_allocated(self) -> int | None:
        """None: ONNX Runtime's Python API does not report its arena's peak."""
        return None

    def notes(self) -> tuple[str, ...]:
        """None: its numbers need no explanation."""
        return ()
