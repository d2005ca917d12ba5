"""Small ControlNets of random weights in the published layouts, and what diffusers generates with them."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from parity import Drawing, Guided, diffusers_guidance, open_with_diffusers
from PIL import Image
from safetensors.numpy import save_file

from zimage_export.controlnet import ControlOptions, export_controlnet
from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.events import ImageEvent
from zimage_runtime.pipeline import Pipeline

MODEL = SMALL.config.transformer
PROMPT = "a red fox in the snow 雪"


@dataclass(frozen=True)
class Version:
    """A published version, made as small as the model."""

    name: str
    places: tuple[int, ...]
    channels: int
    refiner: str | None  # as diffusers names it

    @property
    def settings(self) -> dict[str, Any]:
        """What diffusers' class is made with."""
        return {
            "control_layers_places": list(self.places),
            "control_refiner_layers_places": [0, 1],
            "control_in_dim": self.channels,
            "add_control_noise_refiner": self.refiner,
            "dim": MODEL.dim,
            "n_refiner_layers": MODEL.n_refiner_layers,
            "n_heads": MODEL.n_heads,
            "n_kv_heads": MODEL.n_heads,
            "norm_eps": MODEL.norm_eps,
        }


ONE = Version("1.0", (0, 2), 16, None)
TWO = Version("2.0", (0, 1, 2), 33, "control_layers")
TWO_ONE = Version("2.1", (0, 1, 2), 33, "control_noise_refiner")
LITE = Version("2.1-lite", (0, 2), 33, "control_noise_refiner")
VERSIONS = (ONE, TWO, TWO_ONE, LITE)


def random_tensors(version: Version) -> dict[str, Any]:
    """The tensors of a published file: version 2.0's has a refiner that is zero."""
    import torch
    from diffusers import ZImageControlNetModel

    settings = version.settings
    if version.refiner == "control_layers":
        settings["add_control_noise_refiner"] = "control_noise_refiner"
    with torch.device("meta"):
        model = ZImageControlNetModel(**settings)
    tensors = {}
    for name, value in model.state_dict().items():
        rng = np.random.default_rng(zlib.crc32(f"{version.name} {name}".encode()))
        if value.ndim == 1:
            mean, deviation = (0.0, 0.05) if name.endswith(".bias") else (1.0, 0.1)
        else:
            mean, deviation = 0.0, (1.5 if "adaLN" in name else 1.0) / value.shape[1] ** 0.5
        values = rng.normal(mean, deviation, tuple(value.shape))
        if version.refiner == "control_layers" and name.startswith("control_noise_refiner."):
            values *= 0
        tensors[name] = values.astype(np.float32)
    return tensors


def write_control(path: Path, version: Version) -> Path:
    """A published file."""
    save_file(random_tensors(version), path)
    return path


def export(path: Path, out: Path, version: Version, precision: Precision = Precision.FP32) -> None:
    """Exports a file of a version. Its size is no published one, so that its places are said."""
    export_controlnet(path, out, ControlOptions(precision, version.places, verify=True), Progress(quiet=True))


def diffusers_controlnet(version: Version) -> Any:
    """The same in diffusers' class."""
    import torch
    from diffusers import ZImageControlNetModel

    model = ZImageControlNetModel(**version.settings)
    tensors = {name: torch.from_numpy(values) for name, values in random_tensors(version).items()}
    names = set(model.state_dict())
    model.load_state_dict({name: value for name, value in tensors.items() if name in names})
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Controlled:
    """One image to generate under control."""

    size: tuple[int, int] = (64, 64)  # width, height
    scale: float = 0.75
    steps: int = 4
    seed: int = 3
    window: tuple[float, float] = (0.0, 1.0)
    guided: Guided | None = None
    inpaints: bool = field(default=False, kw_only=True)


def photograph(width: int, height: int, seed: int = 1) -> Image.Image:
    """Smooth colours, an edge and some grain."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    disc = np.where((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06, 0.8, -0.5)
    waves = [np.sin((6 + seed) * x + 3 * y), np.cos(5 * y - 2 * seed * x), disc]
    grain = np.random.default_rng(seed).normal(0, 0.05, (height, width, 3))
    values = np.clip((np.stack(waves, -1) + grain) * 127 + 128, 0, 255)
    return Image.fromarray(values.astype(np.uint8))


def blot(width: int, height: int) -> Image.Image:
    """A mask with soft, slanted edges."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return Image.fromarray(np.clip((np.sin(9 * x + 4 * y) + 0.3) * 300 + 128, 0, 255).astype(np.uint8))


def ours(pipeline: Pipeline, net: Path | None, case: Controlled, **more: Any) -> Drawing:
    """What our pipeline generates; without a ControlNet, nothing that goes with one is given."""
    (found,) = all_of_ours(pipeline, net, case, **more)
    return found


def all_of_ours(pipeline: Pipeline, net: Path | None, case: Controlled, **more: Any) -> list[Drawing]:
    """The same for requests of several images."""
    given: dict[str, Any] = {} if case.guided is None else case.guided.ours()
    if case.inpaints:
        given |= {"image": photograph(*case.size, 2), "mask": blot(*case.size)}
    if net is not None:
        given |= {"control": photograph(*case.size), "controlnet": net, "control_scale": case.scale}
        given |= {"control_start": case.window[0], "control_end": case.window[1]}
    events = pipeline.stream(PROMPT, **({"size": case.size, "steps": case.steps, "seed": case.seed} | given | more))
    return [Drawing(e.latents, np.asarray(e.image)) for e in events if isinstance(e, ImageEvent)]


def theirs(text_to_image: Any, controlnet: Any, case: Controlled) -> Drawing:
    """What diffusers' pipelines generate. They have no window: outside it, their ControlNet is left out."""
    import torch
    from diffusers import ZImageControlNetInpaintPipeline, ZImageControlNetPipeline

    kind = ZImageControlNetInpaintPipeline if case.inpaints else ZImageControlNetPipeline
    pipeline = kind(**text_to_image.components, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"control_image": photograph(*case.size)}
    if case.inpaints:
        given |= {"image": photograph(*case.size, 2), "mask_image": blot(*case.size)}
    taken = 0
    forward = controlnet.forward

    def windowed(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        start, end = case.window
        keep = not (taken / case.steps < start or (taken + 1) / case.steps > end)
        taken += 1
        return forward(*args, **kwargs) if keep else None

    controlnet.forward = windowed
    try:
        with torch.no_grad():
            latents = pipeline(
                prompt=PROMPT,
                width=case.size[0],
                height=case.size[1],
                num_inference_steps=case.steps,
                controlnet_conditioning_scale=case.scale,
                generator=torch.Generator("cpu").manual_seed(case.seed),
                output_type="latent",
                **diffusers_guidance(case.guided),
                **given,
            ).images
            config = pipeline.vae.config
            decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
            (image,) = pipeline.image_processor.postprocess(decoded, output_type="pil")
    finally:
        controlnet.forward = forward
    return Drawing(latents[0].numpy(), np.asarray(image))


def write_lora(path: Path, rank: int = 3) -> Path:
    """A LoRA of what the ControlNet shares with the model: refiners, and the timestep's embedding."""
    width = MODEL.dim
    stems = [f"{stem}.{index}.attention" for stem in ("noise_refiner", "context_refiner") for index in (0, 1)]
    shapes = {f"{stem}.{name}": (width, width) for stem in stems for name in ("to_q", "to_v", "to_out.0")}
    shapes |= {"t_embedder.mlp.0": (1024, 256), "t_embedder.mlp.2": (width, 1024)}
    rng = np.random.default_rng(5)
    tensors = {}
    for module, (out, in_width) in shapes.items():
        down, up = rng.standard_normal((rank, in_width)) / in_width**0.5, rng.standard_normal((out, rank)) / 2
        tensors |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, path)
    return path


def with_lora(checkpoint: Path, path: Path, weight: float) -> Any:
    """diffusers' pipeline with a LoRA."""
    pipeline = open_with_diffusers(checkpoint)
    pipeline.load_lora_weights(path, adapter_name="refiners")
    pipeline.set_adapters(["refiners"], [weight])
    return pipeline
