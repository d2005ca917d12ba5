"""OpenVINO GenAI's Text2ImagePipeline, on a model that optimum-intel's exporter made of the same checkpoint.

Both are in an environment of their own (`openvino_environment`). The exporter runs there, outside the measured process,
which imports OpenVINO GenAI from it; noise is torch's, so that a seed gives the image that the others give. Pixels are
cut off where the others round, which is a difference of 1/255.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runtime.errors import ZImageRuntimeError
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.noise import TorchGenerator

from ..job import WorkerJob
from ..schema import DECODE, STEP, TEXT
from . import Mark
from .openvino_environment import COMMAND, environment_folder, is_made, script, site_packages

if TYPE_CHECKING:
    from PIL.Image import Image


class OpenVinoExportError(ZImageRuntimeError):
    """optimum-intel could not export the checkpoint."""


class OpenVino:
    """Weights and computation in float32."""

    packages: tuple[str, ...] = ("openvino-genai", "openvino", "optimum-intel")
    precision = "fp32"
    hint: str | None = "f32"  # of the type to compute in; None: as OpenVINO chooses for this processor

    def obstacle(self, config: ModelConfig) -> str | None:
        """Its environment is missing."""
        if is_made(environment_folder()):
            return None
        return f"it needs an environment of its own, of 2 GB; make it with {COMMAND}"

    def convert(self, model: Path, work: Path) -> Path:
        """Exports the checkpoint, once. Raises `OpenVinoExportError`."""
        out = work / f"openvino-{self.precision}"
        if not (out / "complete").exists():
            words = ["export", "openvino", "--model", str(model), "--task", "text-to-image"]
            command = [str(script(environment_folder(), "optimum-cli")), *words, "--weight-format", self.precision]
            clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
            done = subprocess.run([*command, str(out)], capture_output=True, text=True, env=clean, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
                raise OpenVinoExportError(f"optimum-intel cannot export {model.name}: {last[:300]}")
            (out / "complete").touch()
        return out

    def prepare(self) -> None:
        """Imports OpenVINO GenAI from its environment, behind what is installed here."""
        sys.path.append(str(site_packages(environment_folder())))
        import numpy  # noqa: F401
        import openvino_genai  # noqa: F401
        import PIL.Image  # noqa: F401

    def load(self, job: WorkerJob) -> "OpenVinoModel":
        """Reads and compiles all programs for the CPU."""
        import openvino_genai

        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.case.threads}
        if self.hint:
            settings["INFERENCE_PRECISION_HINT"] = self.hint
        return OpenVinoModel(openvino_genai.Text2ImagePipeline(job.model, "CPU", **settings), job, self.hint)


class OpenVinoInt8(OpenVino):
    """Weights in 8 bits, which are widened; computation in the type that OpenVINO chooses, as its users run it."""

    precision = "int8"
    hint = None


class OpenVinoModel:
    """A compiled pipeline."""

    def __init__(self, pipeline: Any, job: WorkerJob, hint: str | None) -> None:
        self._pipeline, self._case, self._hint = pipeline, job.case, hint

    def generate(self, mark: Mark) -> "Image":
        """One image. Noise is drawn when the prompt is encoded, and each step calls back."""
        import PIL.Image

        case = self._case

        def after_step(step: int, steps: int, latents: Any) -> bool:
            mark(STEP)
            return False  # go on

        result = self._pipeline.generate(
            case.prompt,
            width=case.width,
            height=case.height,
            num_inference_steps=case.steps,
            guidance_scale=0.0,
            generator=_noise_of(case.seed, mark),
            callback=after_step,
        )
        mark(DECODE)
        return PIL.Image.fromarray(result.data[0])

    def on_gpu(self) -> bool:
        """Never: the pipeline is compiled for the CPU."""
        return False

    def gpu_allocated(self) -> int | None:
        """None: no GPU takes part."""
        return None

    def notes(self) -> tuple[str, ...]:
        """What it computes in, and why its text stage takes longer than ours."""
        computed = "float32" if self._hint else "the type that OpenVINO chooses for this processor"
        return (f"computes in {computed}, with torch's noise; it pads every prompt to 512 tokens",)


def _noise_of(seed: int, mark: Mark) -> Any:
    """OpenVINO GenAI's interface to noise, of torch's generator on the CPU."""
    import openvino
    import openvino_genai

    class Noise(openvino_genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            openvino_genai.Generator.__init__(self)
            self._noise = TorchGenerator(seed)

        def next(self) -> float:
            raise NotImplementedError("noise is drawn as a whole")

        def seed(self, value: int) -> None:
            self._noise = TorchGenerator(value)

        def randn_tensor(self, shape: Any) -> Any:
            mark(TEXT)
            return openvino.Tensor(self._noise.normals(tuple(shape)))

    return Noise()
