"""diffusers' own pipeline on the same checkpoint: eager in float32 (the reference) and bf16, compiled, and offloaded.

Stages are called one by one, so that each can be timed: ``encode_prompt``, the steps, ``vae.decode``. On a GPU, where
calls return before the work is done, every mark waits for the device first.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_runtime.model.config import ModelConfig

from ..job import WorkerJob
from ..schema import DECODE, STEP, TEXT
from . import Mark

if TYPE_CHECKING:
    from PIL.Image import Image


def _sees_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


@dataclass
class _Diffusers:
    packages: tuple[str, ...] = ("diffusers", "torch", "transformers", "numpy")
    precision: str = "fp32"
    compiles: bool = False
    offloads: bool = False
    prefers_gpu: bool = True
    _notes: list[str] = field(default_factory=list)

    def obstacle(self, config: ModelConfig) -> str | None:
        """Missing packages, or a GPU where offloading needs one."""
        missing = [name for name in ("torch", "diffusers", "transformers") if find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed; pip install 'zimage-rt[export]'"
        if self.offloads and not _sees_gpu():
            return "offloading moves weights between the CPU and a GPU, and torch finds no GPU here"
        return None

    def convert(self, model: Path, work: Path) -> Path:
        """The model as it is."""
        return model

    def prepare(self) -> None:
        """Imports torch, diffusers and transformers."""
        import diffusers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401

    def load(self, job: WorkerJob) -> "DiffusersModel":
        """The whole pipeline, with as many threads as we use."""
        import torch
        from diffusers import ZImagePipeline

        torch.set_num_threads(job.case.threads)
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        pipeline = ZImagePipeline.from_pretrained(job.model, dtype=dtype, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        device = "cuda" if self.prefers_gpu and torch.cuda.is_available() else "cpu"
        if self.offloads:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to(device)
        if self.compiles:
            pipeline.transformer = torch.compile(pipeline.transformer)
        return DiffusersModel(pipeline, job, device)


class Streamed(_Diffusers):
    """The reference where it does not fit in memory: the same code in float32, a block's weights at a time."""

    def __init__(self) -> None:
        super().__init__(prefers_gpu=False)

    def load(self, job: WorkerJob) -> "DiffusersModel":
        """Loads only the VAE: blocks are read each time that they run."""
        import torch

        from zimage_export.measure.reference import reference_pipeline
        from zimage_export.source.checkpoint import Checkpoint

        torch.set_num_threads(job.case.threads)
        return DiffusersModel(reference_pipeline(Checkpoint.open(job.model)), job, "cpu")


class Eager(_Diffusers):
    """In float32 on the CPU: the reference, that every image is compared with."""

    def __init__(self) -> None:
        super().__init__(prefers_gpu=False)


class EagerBf16(_Diffusers):
    """As published: bf16, on the GPU where torch finds one."""

    def __init__(self) -> None:
        super().__init__(precision="bf16")


class Compiled(_Diffusers):
    """With ``torch.compile`` on the transformer. bf16 where there is a GPU; float32 on the CPU."""

    def __init__(self) -> None:
        super().__init__(precision="bf16" if _sees_gpu() else "fp32", compiles=True)


class Offloaded(_Diffusers):
    """``enable_model_cpu_offload``: what diffusers offers for a small GPU."""

    def __init__(self) -> None:
        super().__init__(precision="bf16", offloads=True)


class DiffusersModel:
    """A loaded pipeline."""

    def __init__(self, pipeline: Any, job: WorkerJob, device: str) -> None:
        self._pipeline, self._case, self._device = pipeline, job.case, device

    def generate(self, mark: Mark) -> "Image":
        """One image. The generator is torch's on the CPU, which gives the same noise as ours."""
        import torch

        case, pipeline = self._case, self._pipeline

        def wait_and_mark(stage: str) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            mark(stage)

        def after_step(_pipeline: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            wait_and_mark(STEP)
            return kwargs

        with torch.inference_mode():
            embeds, _ = pipeline.encode_prompt(prompt=case.prompt, do_classifier_free_guidance=False)
            wait_and_mark(TEXT)
            latents = pipeline(
                prompt_embeds=embeds,
                width=case.width,
                height=case.height,
                num_inference_steps=case.steps,
                guidance_scale=0.0,
                generator=torch.Generator("cpu").manual_seed(case.seed),
                output_type="latent",
                callback_on_step_end=after_step,
            ).images
            vae = pipeline.vae
            unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(unscaled, return_dict=False)[0]
            (image,) = pipeline.image_processor.postprocess(decoded.float(), output_type="pil")
        wait_and_mark(DECODE)
        generated: Image = image
        return generated

    def on_gpu(self) -> bool:
        """Whether the pipeline was moved there, or is moved there piece by piece."""
        return self._device == "cuda"

    def gpu_allocated(self) -> int | None:
        """The peak of torch's caching allocator."""
        import torch

        return int(torch.cuda.max_memory_allocated()) if self.on_gpu() else None

    def notes(self) -> tuple[str, ...]:
        """The device, and why its text stage takes longer than ours."""
        return (f"on {self._device}; it pads every prompt to 512 tokens before the text encoder",)
