"""How far a bundle is from its checkpoint: each component alone, then the final latents and the picture.

The reference is diffusers in float32 (see `reference`). Components get the reference's own inputs, so that an error
is counted where it arises; the picture is drawn by each side from the prompt on.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision, write_manifest
from zimage_runtime.bundle.tensors import TensorFile
from zimage_runtime.command_line.progress import Advance, Progress
from zimage_runtime.executors.ort.cpu import OrtCpuExecutor
from zimage_runtime.executors.protocol import Floats
from zimage_runtime.machine.int8_products import activation_bits
from zimage_runtime.model.geometry import caption_positions, padded, transformer_rotary
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import PictureEvent, Pipeline, Request, to_image

from ..errors import ExportError
from ..source.checkpoint import Checkpoint
from ..source.single_files import NO_FILES, SingleFiles
from .parity import check_gate, relative_error, summarize
from .reference import ReferencePipeline, reference_pipeline
from .sensitivity import LayerErrors, Layers, summary

PROMPTS = ("a red circle left of a blue square", "白色背景上的一个红色圆形")
"""What is drawn unless the user says otherwise: one prompt in each of the model's languages."""

_MAX_SIDE = 256  # pixels: enough to measure, and hours less than 1024 on a CPU
_FIRST_SEED = 1


@dataclass
class _Capture:
    """What the reference computed on the way of one picture."""

    hidden_states: Floats  # [1, tokens, hidden_size]
    captions: list[Floats] = field(default_factory=list)  # [1, caption_tokens, dim], once a step
    modulations: list[list[Floats]] = field(default_factory=list)  # a step's blocks, [4 * dim] each
    latents: list[Floats] = field(default_factory=list)  # [1, channels, h, w], before each step and after the last
    velocities: list[Floats] = field(default_factory=list)


@dataclass(frozen=True)
class VerifyReport:
    """What was measured."""

    bundle: Bundle  # with its new manifest
    layers: Layers  # what each precision costs each layer


def verify(
    bundle: Bundle,
    model: str | Path,
    progress: Progress,
    size: tuple[int, int] | None = None,
    files: SingleFiles = NO_FILES,
    prompts: Sequence[str] = PROMPTS,
) -> Bundle:
    """As `verify_reported`, for those who want the bundle alone."""
    return verify_reported(bundle, model, progress, size, files, prompts).bundle


def verify_reported(
    bundle: Bundle,
    model: str | Path,
    progress: Progress,
    size: tuple[int, int] | None = None,
    files: SingleFiles = NO_FILES,
    prompts: Sequence[str] = PROMPTS,
) -> VerifyReport:
    """Measures a bundle against its checkpoint and writes what it finds to the manifest.

    `files` are the single files that the bundle was built with; each of `prompts` is drawn once. Returns the bundle
    with its new manifest, and what each precision costs each layer. Raises `CheckpointError` for a bad checkpoint, and
    `ExportError` for one of other dimensions or for a bundle beyond its precision's gate (the manifest is written all
    the same).
    """
    checkpoint = Checkpoint.open(model, files)
    manifest = bundle.manifest
    if checkpoint.config != manifest.config:
        raise ExportError(
            f"{checkpoint.root}: its dimensions are not the bundle's; give the checkpoint it was made from"
        )
    bundle.verify()
    pipeline = Pipeline(bundle, OrtCpuExecutor(bundle, low_memory=True), keep_loaded=False, low_memory=True)
    width, height = size or (min(manifest.defaults.width, _MAX_SIDE), min(manifest.defaults.height, _MAX_SIDE))
    reference = reference_pipeline(checkpoint)
    layer_errors = LayerErrors.watching(reference, checkpoint)
    measured: list[dict[str, float]] = []
    with progress.task("verifying", len(prompts) * manifest.defaults.steps) as advance, torch.inference_mode():
        for seed, prompt in enumerate(prompts, _FIRST_SEED):
            request = pipeline.request(prompt, (width, height), seed=seed)
            measured.append(_measure(pipeline, reference, checkpoint, request, advance))
    layers = layer_errors.report()
    parity = summarize(measured, checkpoint.name, f"{width}x{height}", manifest.defaults.steps)
    parity |= {"activation_bits": activation_bits()} if manifest.precision is Precision.INT8 else {}
    parity["layers"] = summary(layers)
    updated = dataclasses.replace(manifest, parity=parity)
    write_manifest(bundle.root, updated)
    check_gate(parity, updated)
    return VerifyReport(Bundle(bundle.root, updated), layers)


def _measure(
    pipeline: Pipeline, reference: ReferencePipeline, checkpoint: Checkpoint, request: Request, advance: Advance
) -> dict[str, float]:
    """Relative errors by component, and the picture's, for one prompt."""
    capture = _run_reference(reference, request, advance)
    picture = _decode_reference(reference, capture.latents[-1])
    errors = _component_errors(pipeline, checkpoint, request, capture)
    pipeline.release()
    decoded = pipeline.decode(capture.latents[-1])
    errors["decoder"] = relative_error(decoded, picture)
    mean, _ = pipeline.executor.encode(picture)
    errors["encoder"] = relative_error(mean, _encode_reference(reference, picture))
    pipeline.release()
    latents, image = _draw(pipeline, request)
    errors["latents"] = relative_error(latents, capture.latents[-1][0])
    expected = np.asarray(to_image(picture[0])).astype(np.int16)
    difference = np.abs(image.astype(np.int16) - expected)
    errors["max_difference"] = float(difference.max())
    errors["mean_square"] = float(np.mean(np.square(difference, dtype=np.float64)))
    return errors


def _run_reference(reference: ReferencePipeline, request: Request, advance: Advance) -> _Capture:
    embeddings, _ = reference.encode_prompt(request.prompt, do_classifier_free_guidance=False)
    capture = _Capture(embeddings[0][None].numpy())
    transformer = reference.transformer
    modulated = [*transformer.noise_refiner, *transformer.layers]

    def before(module: Any, inputs: Any) -> None:
        capture.latents.append(torch.stack([x[:, 0] for x in inputs[0]]).numpy().copy())
        capture.modulations.append([])

    def after(module: Any, inputs: Any, output: Any) -> None:
        capture.velocities.append(-torch.stack([x[:, 0] for x in output[0]]).numpy())
        advance(1)

    handles = [
        transformer.register_forward_pre_hook(before),
        transformer.register_forward_hook(after),
        transformer.context_refiner[-1].register_forward_hook(
            lambda m, i, o: capture.captions.append(o.numpy().copy())
        ),
        *(
            block.adaLN_modulation.register_forward_hook(
                lambda m, i, o: capture.modulations[-1].append(o[0].numpy().copy())
            )
            for block in modulated
        ),
    ]
    try:
        final = reference(
            prompt=None,
            prompt_embeds=embeddings,
            negative_prompt_embeds=[],
            height=request.geometry.height,
            width=request.geometry.width,
            num_inference_steps=request.schedule.steps,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(request.seeds[0]),
            output_type="latent",
        ).images
    finally:
        for handle in handles:
            handle.remove()
    capture.latents.append(final.numpy().copy())
    return capture


def _component_errors(
    pipeline: Pipeline, checkpoint: Checkpoint, request: Request, capture: _Capture
) -> dict[str, float]:
    config = checkpoint.config
    ids = pipeline.token_ids(request.prompt)
    executor = pipeline.executor
    assert isinstance(executor, OrtCpuExecutor)
    hidden = pipeline.encode_prompt(ids)
    executor.release()
    rotary = transformer_rotary(caption_positions(padded(len(ids))), config.transformer)
    feeds = {"hidden_states": capture.hidden_states, "cos": rotary.cos, "sin": rotary.sin}
    caption = executor.run(Program.CAPTION, feeds)["caption"]
    table = executor.run(Program.MODULATION, {"timesteps": request.schedule.timesteps})["modulation"]
    executor.release()
    denoiser = executor.prepare(pipeline.conditioning(request.geometry, request.schedule, capture.hidden_states))
    velocities = [denoiser(latents, step) for step, latents in enumerate(capture.latents[:-1])]
    return {
        "text_encoder": relative_error(hidden, capture.hidden_states),
        "caption": relative_error(caption, capture.captions[0]),
        "modulation": relative_error(table, _modulation_table(checkpoint, pipeline.bundle, capture)),
        "denoiser": max(relative_error(a, b) for a, b in zip(velocities, capture.velocities, strict=True)),
    }


def _modulation_table(checkpoint: Checkpoint, bundle: Bundle, capture: _Capture) -> Floats:
    """The reference's modulation in the form of the contract: [steps, blocks, 4, dim], times the norms' weights.

    The weights are the bundle's own, out of which rebalancing may have moved a part; what it moved wrongly, the
    denoiser's error tells.
    """
    config = checkpoint.config.transformer
    prefixes = [f"noise_refiner.{i}" for i in range(config.n_refiner_layers)]
    prefixes += [f"layers.{i}" for i in range(config.n_layers)]
    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    stored = TensorFile(bundle.file(bundle.manifest.weights["transformer"]))
    weights = np.stack([np.stack([stored.array(f"{p}.{norm}.weight")[0] for norm in norms]) for p in prefixes])
    raw = np.stack([np.stack(blocks) for blocks in capture.modulations]).reshape(-1, len(prefixes), 4, config.dim)
    raw[:, :, 0::2] += 1
    raw[:, :, 1::2] = np.tanh(raw[:, :, 1::2])
    return np.asarray(raw * weights)


def _decode_reference(reference: ReferencePipeline, latents: Floats) -> Floats:
    vae = reference.vae
    unscaled = torch.from_numpy(latents) / vae.config.scaling_factor + vae.config.shift_factor
    picture: Floats = vae.decode(unscaled, return_dict=False)[0].numpy()
    return picture


def _encode_reference(reference: ReferencePipeline, picture: Floats) -> Floats:
    mean: Floats = reference.vae.encode(torch.from_numpy(picture)).latent_dist.mean.numpy()
    return mean


def _draw(pipeline: Pipeline, request: Request) -> tuple[Floats, NDArray[np.uint8]]:
    picture = next(event for event in pipeline.run(request) if isinstance(event, PictureEvent))
    return picture.latents, np.asarray(picture.image)
