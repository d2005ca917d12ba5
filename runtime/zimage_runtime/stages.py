"""The stages of an image, one by one, on an open session: what a pipeline puts in order.

Source image and prompts are encoded, steps are taken, latents decoded. A request runs them for its own images; a group
of requests runs each stage for all of them. The latents live here, in float32 numpy, where a step is a line.
"""

import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .adapters.branches import Branches
from .adapters.shelf import LoraShelf
from .arrays import FloatArray
from .bundle.bundle import Bundle
from .bundle.tensors import TensorFile, to_float32
from .errors import BundleError, ExecutorError
from .events import CaptionEvent, ImageEvent, StepEvent
from .executors.protocol import Conditioning, Control, Denoiser, Session
from .images.img2img import Encoded, Start
from .images.pixels import to_image
from .job import Job, Prompt
from .model.geometry import (
    ImageGeometry,
    Rotary,
    caption_positions,
    image_positions,
    padded,
    text_rotary,
    transformer_rotary,
)
from .model.noise import BatchNoise, TorchGenerator, mixed
from .model.schedule import Schedule
from .model.tokenizer import PromptTokenizer
from .sampling.samplers import make_solver

TokenIds = tuple[int, ...]


@dataclass
class Stages:
    """A bundle's stages, on whatever session they are given."""

    bundle: Bundle
    _tokenizer: PromptTokenizer = field(init=False, repr=False)
    _embeddings: TensorFile = field(init=False, repr=False)
    _encoded: dict[TokenIds, FloatArray] = field(default_factory=dict, init=False, repr=False)
    _loras: LoraShelf = field(init=False, repr=False)

    def __post_init__(self) -> None:
        manifest = self.bundle.manifest
        self._tokenizer = PromptTokenizer(self.bundle.file(manifest.tokenizer))
        self._embeddings = TensorFile(self.bundle.file(manifest.embeddings))
        self._loras = LoraShelf(self.bundle)

    def encoded_source(self, job: Job, session: Session) -> Encoded | None:
        """A job's source image as latents; None where it has none, or only its ControlNet sees it."""
        if job.source is None or (job.inpaints_by_control and not job.first_step):
            return None
        return Encoded(*session.encode(job.source.pixels))

    def control(self, job: Job, session: Session) -> Control | None:
        """What a job's ControlNet reads: the control image's latents, and those of what is kept of a source image."""
        if job.control is None:
            return None
        manifest, net = self.bundle.manifest, job.control.net
        shape = net.manifest.config.channels, job.geometry.latent_height, job.geometry.latent_width
        channels, latents = manifest.config.vae.latent_channels, np.zeros((1, *shape), np.float32)
        latents[:, :channels] = self._mode(session, job.control.image.pixels)
        if job.source is not None and job.source.mask is not None:
            latents[:, channels] = np.float32(1) - job.source.mask[:, 0]
            latents[:, channels + 1 :] = self._mode(session, job.source.kept_pixels)
        weights = TensorFile(self.bundle.file(manifest.weights["transformer"]))
        pad_token = to_float32(*weights.array("x_pad_token"))
        return Control(net, latents, pad_token, job.control.scale, job.control.steps)

    def _mode(self, session: Session, pixels: FloatArray) -> FloatArray:
        """The most likely latents of an image, as the transformer sees them."""
        vae = self.bundle.manifest.config.vae
        mean, _ = session.encode(pixels)
        return (mean - np.float32(vae.shift_factor)) * np.float32(vae.scaling_factor)

    def encoded_prompts(self, session: Session, prompts: Iterable[TokenIds]) -> dict[TokenIds, FloatArray]:
        """The hidden states of prompts, [1, tokens, hidden_size] each. Those of the last call alone are kept."""
        found = {ids: self.hidden_states(session, ids) for ids in prompts}
        self.keep_prompts(found)
        return found

    def keep_prompts(self, encoded: Mapping[TokenIds, FloatArray]) -> None:
        """Keeps the hidden states of these prompts, and of no others, for the next request."""
        self._encoded = dict(encoded)

    def denoisers(
        self, job: Job, session: Session, encoded: Mapping[TokenIds, FloatArray], control: Control | None
    ) -> tuple[Denoiser, ...]:
        """A denoiser for each prompt of a job, all of which are encoded: the text encoder and the transformer may
        take turns."""
        branches = self._loras.branches(job.loras) if job.loras else None
        prompts = (encoded[ids] for ids in job.prompt_ids)
        each = [self.conditioning(job.geometry, job.schedule, states, branches, control) for states in prompts]
        return tuple(session.denoiser(conditioning) for conditioning in each)

    def denoised(
        self, job: Job, denoisers: tuple[Denoiser, ...], batch: range, encoded: Encoded | None
    ) -> Generator[StepEvent, None, FloatArray]:
        """Takes the steps of the images of a batch, by their indices, with an event after each. Returns the latents:
        [batch, channels, height / 8, width / 8]."""
        estimate = np.empty(0, np.float32)

        def velocity(latents: FloatArray, step: int) -> FloatArray:
            nonlocal estimate
            found = job.guidance.velocity(denoisers, latents, step)
            estimate = job.schedule.image(latents, step, found)
            return found

        colours = self.bundle.manifest.preview
        seeds = tuple(job.seeds[index] for index in batch)
        noise = self._noise(job.geometry, seeds)
        latents, start = self._start(job, noise, batch, encoded)
        solver = make_solver(job.sampler, job.schedule, noise.draw)
        for step in range(job.first_step, job.schedule.steps):
            begin = time.perf_counter()
            latents = solver.step(latents, step, velocity)
            if start is not None:
                latents = start.kept(latents, job.schedule.sigmas[step + 1])
                estimate = start.kept(estimate, job.schedule.sigmas[-1])
            if not np.isfinite(latents).all():
                cure = "give smaller weights to its LoRA" if job.loras else "verify the bundle"
                raise ExecutorError(f"step {step + 1} gave values that are not finite; {cure}")
            taken = step + 1 - job.first_step
            seconds = time.perf_counter() - begin
            yield StepEvent(seeds, taken, job.steps, latents, seconds, estimate, colours)
        return latents

    def decoded(self, job: Job, session: Session, index: int, latents: FloatArray) -> ImageEvent:
        """The image of a job's index, from latents after the last step: [channels, height / 8, width / 8]."""
        begin = time.perf_counter()
        image = to_image(session.decode(self.unscaled(latents[None]))[0])
        return ImageEvent(job.seeds[index], image, latents, time.perf_counter() - begin, job.info_of(index))

    def hidden_states(self, session: Session, ids: TokenIds) -> FloatArray:
        """The text encoder's hidden states of a prompt: [1, tokens, hidden_size]. The last request's are kept."""
        kept = self._encoded  # which another thread may replace at any time
        if ids not in kept:
            rotary = text_rotary(len(ids), self.bundle.manifest.config.text_encoder)
            kept[ids] = session.encode_text(self.embed(ids), rotary)
        return kept[ids]

    def forget_prompt(self) -> None:
        """Drops what is kept of the last prompts: the next request encodes its own, even if they are the same."""
        self._encoded = {}

    def conditioning(
        self,
        geometry: ImageGeometry,
        schedule: Schedule,
        hidden_states: FloatArray,
        branches: Branches | None = None,
        control: Control | None = None,
    ) -> Conditioning:
        """What a denoiser is made from, for a prompt's hidden states [1, tokens, hidden_size]."""
        caption_tokens = padded(hidden_states.shape[1])
        return Conditioning(
            hidden_states=hidden_states,
            timesteps=schedule.timesteps,
            image_rotary=self._rotary(image_positions(geometry, caption_tokens)),
            caption_rotary=self._rotary(caption_positions(caption_tokens)),
            branches=branches,
            control=control,
        )

    def _prompt(self, text: str) -> Prompt:
        ids, cut = self._tokenizer.encode_counted(text)
        return Prompt(text, tuple(ids), cut)

    def token_ids(self, prompt: str) -> list[int]:
        """The ids of a prompt in its template."""
        return self._tokenizer.encode(prompt)

    def _rotary(self, positions: NDArray[np.int64]) -> Rotary:
        return transformer_rotary(positions, self.bundle.manifest.config.transformer)

    def embed(self, ids: TokenIds | list[int]) -> FloatArray:
        """Rows of the embedding table, of which no other row is read: [1, tokens, hidden_size]."""
        name, config = "embed_tokens.weight", self.bundle.manifest.config.text_encoder
        table, dtype = self._embeddings.array(name)
        if table.shape != (config.vocab_size, config.hidden_size):
            raise BundleError(
                f"{self._embeddings.path}: {name} has shape {list(table.shape)}, the manifest says "
                f"{[config.vocab_size, config.hidden_size]}; export or download the bundle again"
            )
        if max(ids) >= len(table):
            raise BundleError(
                f"{self.bundle.root}: its tokenizer gives token {max(ids)}, its text encoder has {len(table)} rows; "
                "export or download the bundle again"
            )
        return to_float32(table[list(ids)], dtype)[None]

    def initial_latents(self, geometry: ImageGeometry, seeds: tuple[int, ...]) -> FloatArray:
        """The noise that each seed starts from: [seeds, channels, height / 8, width / 8]."""
        return self._noise(geometry, seeds).draw()

    def _noise(self, geometry: ImageGeometry, seeds: tuple[int, ...]) -> BatchNoise:
        channels = self.bundle.manifest.config.vae.latent_channels
        shape = (1, channels, geometry.latent_height, geometry.latent_width)
        return BatchNoise(tuple(TorchGenerator(seed) for seed in seeds), shape)

    def _start(
        self, job: Job, noise: BatchNoise, batch: range, encoded: Encoded | None
    ) -> tuple[FloatArray, Start | None]:
        """A batch's first latents: noise, or an image with noise, which may be needed after each step."""
        clean = None if encoded is None else encoded.sample(noise, self.bundle.manifest.config.vae)
        first = noise.draw()
        if job.variation is not None:
            seed, share = job.variation
            first = mixed(first, self.initial_latents(job.geometry, tuple(seed + index for index in batch)), share)
        if clean is None or job.source is None:
            return first, None
        start = Start(clean, first, None if job.inpaints_by_control else job.source.mask)
        return start.at(job.schedule.sigmas[job.first_step]), start

    def unscaled(self, latents: FloatArray) -> FloatArray:
        """Latents as the decoder takes them."""
        vae = self.bundle.manifest.config.vae
        return latents / np.float32(vae.scaling_factor) + np.float32(vae.shift_factor)


def caption_event(job: Job, seconds: float) -> CaptionEvent:
    """That a job's prompts are encoded, which took so long."""
    negative = 0 if job.negative is None else job.negative.cut_tokens
    return CaptionEvent(len(job.ids), job.positive.cut_tokens, seconds, negative_cut_tokens=negative)
