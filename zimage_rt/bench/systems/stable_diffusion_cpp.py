"""stable-diffusion.cpp, through the PyPI package ``stable-diffusion-cpp-python``: same noise, sigmas, size and threads.

Its Z-Image has the published dimensions built in, so it runs only checkpoints of the full size. The checkpoint
is written under ComfyUI's names first, outside the measured process.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from zimage_runtime.model.config import ModelConfig, SchedulerConfig
from zimage_runtime.model.schedule import make_schedule

from ..job import WorkerJob
from ..schema import DECODE, STEP, TEXT
from . import Mark
from .comfyui_files import FILES, convert

if TYPE_CHECKING:
    from PIL.Image import Image

_BUILT_IN = (3840, 30)  # width and layers: z_image.hpp takes no others
_GPU_LIBRARIES = ("libcuda.so", "nvcuda", "libvulkan.so", "vulkan-1", "libamdhip", "amdhip", "libopencl", "opencl.dll")
_PUBLISHED = SchedulerConfig(shift=3.0, num_train_timesteps=1000)


class StableDiffusionCpp:
    """Weights in q8_0, the nearest to our int8."""

    packages: tuple[str, ...] = ("stable-diffusion-cpp-python",)
    precision = "q8_0"

    def obstacle(self, config: ModelConfig) -> str | None:
        """Other dimensions, or the package is missing: it is built from source, by default for the CPU."""
        found = (config.transformer.dim, config.transformer.n_layers)
        if found != _BUILT_IN:
            wanted = "{1} layers of width {0}".format(*_BUILT_IN)
            return f"it runs only models with {wanted}; this model has {found[1]} of width {found[0]}"
        if find_spec("stable_diffusion_cpp") is None:
            return "not installed; CMAKE_ARGS=-DGGML_NATIVE=ON pip install stable-diffusion-cpp-python"
        return None

    def convert(self, model: Path, work: Path) -> Path:
        """Writes the checkpoint's three files under ComfyUI's names, once."""
        return convert(model, work / "comfyui")

    def prepare(self) -> None:
        """Imports the library."""
        import stable_diffusion_cpp  # noqa: F401

    def load(self, job: WorkerJob) -> "CppModel":
        """Reads and quantizes all weights."""
        from stable_diffusion_cpp import StableDiffusion

        folder = Path(job.model)
        model = StableDiffusion(
            diffusion_model_path=str(folder / FILES["transformer"]),
            llm_path=str(folder / FILES["text_encoder"]),
            vae_path=str(folder / FILES["vae"]),
            wtype=self.precision,
            rng_type="cpu",  # torch's generator, so that a seed has the same noise
            sampler_rng_type="cpu",
            vae_decode_only=True,
            n_threads=job.case.threads,
            verbose=False,
        )
        return CppModel(model, job)


class CppModel:
    """A context of the library."""

    def __init__(self, model: Any, job: WorkerJob) -> None:
        self._model, self._case = model, job.case

    def generate(self, mark: Mark) -> "Image":
        """One image. The library reports step 0 when the prompt is encoded, then each step as it ends."""
        case = self._case

        def progress(step: int, steps: int, _seconds: float) -> None:
            if steps == case.steps:  # not that of loading, or of tiles
                mark(STEP if step else TEXT)

        sigmas = make_schedule(case.steps, _PUBLISHED).sigmas
        (image,) = self._model.generate_image(
            prompt=case.prompt,
            width=case.width,
            height=case.height,
            sample_method="euler",
            sample_steps=case.steps,
            sigmas=",".join(f"{float(sigma):.9g}" for sigma in sigmas),
            cfg_scale=1.0,
            seed=case.seed,
            progress_callback=progress,
        )
        mark(DECODE)
        generated: Image = image
        return generated

    def on_gpu(self) -> bool | None:
        """Whether the library was built for a GPU, which shows in the libraries that this process has loaded."""
        if sys.platform == "darwin":  # which gives no such list
            return None
        loaded = [Path(region.path).name.lower() for region in psutil.Process().memory_maps()]
        return any(name in library for library in loaded for name in _GPU_LIBRARIES)

    def gpu_allocated(self) -> int | None:
        """None: the library does not report it."""
        return None

    def notes(self) -> tuple[str, ...]:
        """How its settings match ours."""
        return ("euler with our sigmas and torch's noise; weights in q8_0",)
