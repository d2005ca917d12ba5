"""The way of an image, from request to pixels, as a generator.

The caller gets an event after the caption, after each step and with each image, and so owns progress, previews, timing
and cancelling. The latents live here, in float32 numpy, where a step is a line.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .adapters.branches import Branches
from .adapters.shelf import LoraShelf
from .arrays import FloatArray
from .bundle.bundle import Bundle
from .bundle.hub import bundle_directory
from .bundle.tensors import TensorFile, to_float32
from .errors import BundleError, CancelledError, DeviceLostError, ExecutorError, RequestError
from .events import (
    MAX_COUNT,
    CaptionEvent,
    EncodeEvent,
    Event,
    ImageEvent,
    NoticeEvent,
    Request,
    Result,
    StepEvent,
    Timings,
)
from .executors.choose import ExecutorChoice
from .executors.protocol import Conditioning, Control, Denoiser, Executor, Options, Session
from .executors.registry import AUTO
from .images.img2img import Encoded, Start
from .images.pixels import to_image
from .job import Job, Prompt, read_control
from .keyword_fields import with_fields
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
from .prepare import prepare_job
from .sampling.samplers import make_solver

__all__ = [
    "MAX_COUNT",
    "CaptionEvent",
    "EncodeEvent",
    "Event",
    "ImageEvent",
    "Job",
    "NoticeEvent",
    "Pipeline",
    "Request",
    "Result",
    "StepEvent",
    "Timings",
    "to_image",
]


@dataclass
class Pipeline:
    """A bundle and what runs it. Make one with `from_bundle`; as a context manager, it closes itself."""

    bundle: Bundle
    choice: ExecutorChoice
    _tokenizer: PromptTokenizer = field(init=False, repr=False)
    _embeddings: TensorFile = field(init=False, repr=False)
    _encoded: dict[tuple[int, ...], FloatArray] = field(default_factory=dict, init=False, repr=False)
    _sessions: list[Session] = field(default_factory=list, init=False, repr=False)
    _loras: LoraShelf = field(init=False, repr=False)
    _cancels: int = field(default=0, init=False, repr=False)  # how often `cancel` was called

    def __post_init__(self) -> None:
        manifest = self.bundle.manifest
        self._tokenizer = PromptTokenizer(self.bundle.file(manifest.tokenizer))
        self._embeddings = TensorFile(self.bundle.file(manifest.embeddings))
        self._loras = LoraShelf(self.bundle)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        executor: str = AUTO,
        vram: int | None = None,
        *,
        device: int = 0,
        low_memory: bool = False,
        keep_loaded: bool = True,
        trust_engines: bool = False,
        note: Callable[[str], object] = lambda text: None,
    ) -> Self:
        """Opens a bundle: a directory, or a name on the Hub, ``ORG/NAME``, whose files are fetched into the cache
        of huggingface_hub. Nothing large is read yet.

        `executor` is a name from the registry, or "auto": for each request the best that can run it. `vram` is a
        budget in bytes for executors on a GPU, by default what is free there now, and `device` the GPU's number. With
        `low_memory`, weights on the CPU stay mapped from the file. With `keep_loaded`, what fits in memory stays
        loaded between requests. `trust_engines` loads the bundle's own engines for TensorRT, which are code, instead
        of building engines here once: only for a bundle from someone you trust. `note` gets a line for what is done
        once and takes a while.

        Raises `BundleError`, `HubError`, or `RequestError` for an executor that cannot run here.
        """
        bundle = Bundle.open(bundle_directory(path))
        options = Options(
            vram=vram,
            device=device,
            low_memory=low_memory,
            keep_loaded=keep_loaded,
            trust_engines=trust_engines,
            note=note,
        )
        choice = ExecutorChoice(bundle, executor, options)
        choice.open()
        return cls(bundle, choice)

    @classmethod
    def on(cls, bundle: Bundle, executor: Executor) -> Self:
        """A pipeline on an executor that is already open."""
        return cls(bundle, ExecutorChoice.of(bundle, executor))

    @property
    def executor(self) -> Executor:
        """The executor of the last request; before the first one, the best that opens."""
        return self.choice.open()

    @with_fields(Request)
    def generate(self, request: Request) -> Result:
        """Generates the images of a request, whose fields are the arguments: ``generate("a fox", seed=7)``.

        A seed gives the image that diffusers gives with ``torch.Generator("cpu").manual_seed(seed)``. A source image
        is resized to `size`, which by default is its own, cut to multiples of 16. The result holds all images: for
        many, use `stream`.

        Raises `RequestError`, `MemoryLimitError` (both before anything is loaded) or `ExecutorError`.
        """
        start = time.perf_counter()
        caption = encode = 0.0
        steps: list[float] = []
        images: list[ImageEvent] = []
        for event in self.run(self.prepare(request, keeps_images=True)):
            match event:
                case EncodeEvent():
                    encode = event.seconds
                case CaptionEvent():
                    caption = event.seconds
                case StepEvent():
                    steps.append(event.seconds)
                case ImageEvent():
                    images.append(event)
        decode = tuple(event.seconds for event in images)
        timings = Timings(caption, tuple(steps), decode, time.perf_counter() - start, encode)
        return Result([e.image for e in images], [e.seed for e in images], timings, [e.info for e in images])

    @with_fields(Request)
    def stream(self, request: Request) -> Iterator[Event]:
        """The same as `generate`, event by event. The request is checked now, not at the first event."""
        return self.run(self.prepare(request))

    def prepare(self, request: Request, *, keeps_images: bool = False) -> Job:
        """Checks a request against the bundle, reads its images and plans it. Nothing large is loaded.

        `keeps_images` says that the caller holds all images in memory until the end. Raises `RequestError`, or
        `MemoryLimitError` where no executor can hold the request.
        """
        return prepare_job(
            request,
            self.bundle,
            self.choice,
            self._prompt,
            self._loras,
            cancels=self._cancels,
            keeps_images=keeps_images,
        )

    def run(self, job: Job) -> Iterator[Event]:
        """Generates what was prepared. A stream that is closed early frees what it may not keep.

        Raises `RequestError` for a job whose executor was left for a later request's.
        """
        self._check_open(job)
        return self._run(job)

    def _check_open(self, job: Job) -> None:
        if job.executor is not self.choice.current:
            raise RequestError(f"the {job.executor.name} executor was closed since; prepare the request again")

    def _run(self, job: Job) -> Iterator[Event]:
        yield from job.notices
        self._check_open(job)  # again, for a stream may begin long after it was made
        with job.executor.session(job.plan) as session:
            self._sessions.append(session)
            try:
                if job.cancels != self._cancels:  # before the session was there to be cancelled
                    raise CancelledError
                yield from self._events(job, session)
            finally:
                self._sessions.remove(session)

    def _events(self, job: Job, session: Session) -> Iterator[Event]:
        encoded = None
        begin = time.perf_counter()
        if job.source is not None and (job.first_step or not job.inpaints_by_control):
            encoded = Encoded(*session.encode(job.source.pixels))
        control = read_control(job, session, self.bundle)
        if encoded is not None or control is not None:
            yield EncodeEvent(time.perf_counter() - begin)
        begin = time.perf_counter()
        prompts = [prompt for prompt in (job.positive, job.negative) if prompt is not None]
        denoisers = self._denoisers(job, session, [prompt.ids for prompt in prompts], control)
        cut = [prompt.cut_tokens for prompt in prompts]
        yield CaptionEvent(len(job.ids), cut[0], time.perf_counter() - begin, negative_cut_tokens=sum(cut[1:]))

        estimate = np.empty(0, np.float32)

        def velocity(latents: FloatArray, step: int) -> FloatArray:
            nonlocal estimate
            found = job.guidance.velocity(denoisers, latents, step)
            estimate = job.schedule.image(latents, step, found)
            return found

        colours = self.bundle.manifest.preview
        whole_batches = max(job.plan.group // job.batch_size, 1) * job.batch_size
        for group in _parts(range(len(job.seeds)), whole_batches):
            finished: list[FloatArray] = []
            for batch in _parts(group, job.batch_size):
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
                finished.extend(latents)
            for index, one in zip(group, finished, strict=True):
                begin = time.perf_counter()
                image = to_image(session.decode(self.unscaled(one[None]))[0])
                yield ImageEvent(job.seeds[index], image, one, time.perf_counter() - begin, job.info_of(index))

    def _denoisers(
        self, job: Job, session: Session, prompts: list[tuple[int, ...]], control: Control | None
    ) -> tuple[Denoiser, ...]:
        """A denoiser for each prompt. All are encoded first: the text encoder and the transformer may take turns."""
        found = [self.hidden_states(session, ids) for ids in prompts]
        self._encoded = dict(zip(prompts, found, strict=True))  # the last request's alone are kept
        branches = self._loras.branches(job.loras) if job.loras else None
        each = [self.conditioning(job.geometry, job.schedule, hidden, branches, control) for hidden in found]
        return tuple(session.denoiser(conditioning) for conditioning in each)

    def hidden_states(self, session: Session, ids: tuple[int, ...]) -> FloatArray:
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

    def embed(self, ids: tuple[int, ...] | list[int]) -> FloatArray:
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

    def cancel(self) -> None:
        """Stops what was asked of this pipeline so far, from any thread: streams, those that have not begun included,
        raise `CancelledError` within moments. Later requests run."""
        self._cancels += 1
        for session in tuple(self._sessions):
            session.cancel()

    def release(self) -> None:
        """Frees all that is loaded; the next image loads it again."""
        self._encoded = {}
        self._loras.forget()
        if self.choice.current is not None:
            self.choice.current.release()

    def close(self) -> None:
        """Cancels what runs, frees everything and writes caches. A later request opens the executor again."""
        self.cancel()
        self._encoded = {}
        self._loras.forget()
        self.choice.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or not issubclass(kind, DeviceLostError):  # whose clean-up may wait without end
            self.close()


def _parts(indices: range, size: int) -> Iterator[range]:
    for first in range(0, len(indices), size):
        yield indices[first : first + size]
