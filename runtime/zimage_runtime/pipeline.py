"""The way of an image, from request to pixels, as a generator.

The caller gets an event after the caption, after each step and with each image, and so owns progress, previews, timing
and cancelling. The latents live here, in float32 numpy, where a step is a line.
"""

import functools
import inspect
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from .arrays import FloatArray
from .bundle.bundle import Bundle
from .bundle.hub import bundle_directory
from .bundle.tensors import TensorFile, to_float32
from .errors import BundleError, DeviceLostError, ExecutorError, RequestError
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
from .executors.choose import Chosen, ExecutorChoice
from .executors.protocol import Conditioning, Executor, Options, Plan, Session, Work
from .executors.registry import AUTO
from .guidance import Guidance, NoGuidance
from .images.img2img import DEFAULT_MASKED_STRENGTH, DEFAULT_STRENGTH, Encoded, Start, steps_skipped
from .images.metadata import ImageInfo
from .images.source_image import SourceImage, open_given
from .model.geometry import (
    ImageGeometry,
    Rotary,
    caption_positions,
    image_geometry,
    image_positions,
    padded,
    text_rotary,
    transformer_rotary,
)
from .model.noise import TorchGenerator
from .model.schedule import Schedule, make_schedule
from .model.tokenizer import PromptTokenizer
from .sampler import Euler, Sampler

if TYPE_CHECKING:
    from PIL.Image import Image

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

P = ParamSpec("P")
R = TypeVar("R")


def _with_fields(
    make: Callable[P, Request],
) -> Callable[[Callable[["Pipeline", Request], R]], Callable[Concatenate["Pipeline", P], R]]:
    """Turns a method of a request into one that takes the request's fields, which are written in `Request` alone."""

    def wrap(method: Callable[["Pipeline", Request], R]) -> Callable[Concatenate["Pipeline", P], R]:
        def call(pipeline: "Pipeline", /, *args: P.args, **kwargs: P.kwargs) -> R:
            return method(pipeline, make(*args, **kwargs))

        functools.update_wrapper(call, method)
        own = next(iter(inspect.signature(method).parameters.values()))
        shown = inspect.signature(method).replace(parameters=[own, *inspect.signature(make).parameters.values()])
        call.__signature__ = shown  # type: ignore[attr-defined]  # for help() and editors
        return call

    return wrap


@dataclass(frozen=True)
class Job:
    """A request that was checked against the bundle and planned: its defaults filled in, its images read."""

    prompt: str
    ids: tuple[int, ...]  # of the prompt in its template
    cut_tokens: int  # beyond what the model sees
    geometry: ImageGeometry
    schedule: Schedule
    seeds: tuple[int, ...]
    batch_size: int
    source: SourceImage | None
    first_step: int  # of the schedule; a source image leaves out those before it
    executor: Executor
    plan: Plan
    notices: tuple[NoticeEvent, ...]  # what the user should know
    choice: str | None  # which executor `auto` chose, and why
    info: ImageInfo  # of the first seed's image
    sampler: Sampler = field(default_factory=Euler)
    guidance: Guidance = field(default_factory=NoGuidance)

    @property
    def steps(self) -> int:
        """Steps that are taken for each image."""
        return self.schedule.steps - self.first_step


@dataclass
class Pipeline:
    """A bundle and what runs it. Make one with `from_bundle`; as a context manager, it closes itself."""

    bundle: Bundle
    choice: ExecutorChoice
    _tokenizer: PromptTokenizer = field(init=False, repr=False)
    _embeddings: TensorFile = field(init=False, repr=False)
    _encoded: tuple[tuple[int, ...], FloatArray] | None = field(default=None, init=False, repr=False)
    _sessions: list[Session] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        manifest = self.bundle.manifest
        self._tokenizer = PromptTokenizer(self.bundle.file(manifest.tokenizer))
        self._embeddings = TensorFile(self.bundle.file(manifest.embeddings))

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
        note: Callable[[str], object] = lambda text: None,
    ) -> Self:
        """Opens a bundle: a directory, or a name on the Hub, ``ORG/NAME``, whose files are fetched into the cache
        of huggingface_hub. Nothing large is read yet.

        `executor` is a name from the registry, or "auto": for each request the best that can run it. `vram` is a
        budget in bytes for executors on a GPU, by default what is free there now, and `device` the GPU's number. With
        `low_memory`, weights on the CPU stay mapped from the file. With `keep_loaded`, what fits in memory stays
        loaded between requests. `note` gets a line for what is done once and takes a while.

        Raises `BundleError`, `HubError`, or `RequestError` for an executor that cannot run here.
        """
        bundle = Bundle.open(bundle_directory(path))
        options = Options(vram=vram, device=device, low_memory=low_memory, keep_loaded=keep_loaded, note=note)
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

    @_with_fields(Request)
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

    @_with_fields(Request)
    def stream(self, request: Request) -> Iterator[Event]:
        """The same as `generate`, event by event. The request is checked now, not at the first event."""
        return self.run(self.prepare(request))

    def prepare(self, request: Request, *, keeps_images: bool = False) -> Job:
        """Checks a request against the bundle, reads its images and plans it. Nothing large is loaded.

        `keeps_images` says that the caller holds all images in memory until the end. Raises `RequestError`, or
        `MemoryLimitError` where no executor can hold the request.
        """
        manifest, config = self.bundle.manifest, self.bundle.manifest.config
        given = None if request.image is None else open_given(request.image, request.mask, request.mask_grow)
        size = request.size
        if size is None:
            defaults = (manifest.defaults.width, manifest.defaults.height)
            size = defaults if given is None else given.own_size(config.vae)
        geometry = image_geometry(int(size[0]), int(size[1]), config)
        schedule = make_schedule(int(request.steps or manifest.defaults.steps), config.scheduler)
        source, strength, first_step = None, request.strength, 0
        if given is not None:
            if strength is None:
                strength = DEFAULT_STRENGTH if request.mask is None else DEFAULT_MASKED_STRENGTH
            first_step = steps_skipped(schedule.steps, strength)
            source = given.resized(geometry.width, geometry.height, config.vae)
        count = int(request.count)
        first = secrets.randbelow(2**32 - count) if request.seed is None else int(request.seed)
        batch = min(int(request.batch_size), count)
        ids, cut = self._tokenizer.encode_counted(request.prompt)
        chosen = self.choice.plan(
            Work(
                geometry=geometry,
                tokens=len(ids),
                batch=batch,
                count=count,
                encodes=source is not None,
                held=3 * geometry.width * geometry.height * count if keeps_images else 0,
            )
        )
        computed = chosen.executor.computation(chosen.plan)
        info = ImageInfo(
            prompt=request.prompt,
            seed=first,
            width=geometry.width,
            height=geometry.height,
            steps=schedule.steps,
            model=manifest.name,
            fingerprint=manifest.fingerprint,
            executor=chosen.executor.name,
            strength=None if source is None or strength is None else float(strength),
            image=source.image_hash if source else None,
            mask=source.mask_hash if source else None,
            mask_grow=source.mask_grow if source else 0,
            program=computed.program,
            activation_bits=computed.activation_bits,
            library=computed.library,
        )
        return Job(
            prompt=request.prompt,
            ids=tuple(ids),
            cut_tokens=cut,
            geometry=geometry,
            schedule=schedule,
            seeds=tuple(range(first, first + count)),
            batch_size=batch,
            source=source,
            first_step=first_step,
            executor=chosen.executor,
            plan=chosen.plan,
            notices=_notices(chosen),
            choice=chosen.why,
            info=info,
        )

    def run(self, job: Job) -> Iterator[Event]:
        """Generates what was prepared. A stream that is closed early frees what it may not keep.

        Raises `RequestError` for a job whose executor was left for a later request's.
        """
        if job.executor is not self.choice.current:
            raise RequestError(f"the {job.executor.name} executor was closed since; prepare the request again")
        return self._run(job)

    def _run(self, job: Job) -> Iterator[Event]:
        yield from job.notices
        with job.executor.session(job.plan) as session:
            self._sessions.append(session)
            try:
                yield from self._events(job, session)
            finally:
                self._sessions.remove(session)

    def _events(self, job: Job, session: Session) -> Iterator[Event]:
        encoded = None
        if job.source is not None:
            begin = time.perf_counter()
            encoded = Encoded(*session.encode(job.source.pixels))
            yield EncodeEvent(time.perf_counter() - begin)
        begin = time.perf_counter()
        hidden_states = self.hidden_states(session, job.ids)
        denoiser = session.denoiser(self.conditioning(job.geometry, job.schedule, hidden_states))
        yield CaptionEvent(len(job.ids), job.cut_tokens, time.perf_counter() - begin)

        def velocity(latents: FloatArray, step: int) -> FloatArray:
            return job.guidance.velocity(denoiser, latents, step)

        whole_batches = max(job.plan.group // job.batch_size, 1) * job.batch_size
        for group in _parts(job.seeds, whole_batches):
            finished: list[FloatArray] = []
            for seeds in _parts(group, job.batch_size):
                latents, start = self._start(job, seeds, encoded)
                for step in range(job.first_step, job.schedule.steps):
                    begin = time.perf_counter()
                    latents = job.sampler(latents, step, job.schedule, velocity)
                    if start is not None:
                        latents = start.kept(latents, job.schedule.sigmas[step + 1])
                    if not np.isfinite(latents).all():
                        raise ExecutorError(f"step {step + 1} gave values that are not finite; verify the bundle")
                    taken = step + 1 - job.first_step
                    yield StepEvent(seeds, taken, job.steps, latents, time.perf_counter() - begin)
                finished.extend(latents)
            for seed, one in zip(group, finished, strict=True):
                begin = time.perf_counter()
                image = to_image(session.decode(self.unscaled(one[None]))[0])
                yield ImageEvent(seed, image, one, time.perf_counter() - begin, replace(job.info, seed=seed))

    def hidden_states(self, session: Session, ids: tuple[int, ...]) -> FloatArray:
        """The text encoder's hidden states of a prompt: [1, tokens, hidden_size]. The last prompt's are kept."""
        if self._encoded is None or self._encoded[0] != ids:
            rotary = text_rotary(len(ids), self.bundle.manifest.config.text_encoder)
            self._encoded = (ids, session.encode_text(self.embed(ids), rotary))
        return self._encoded[1]

    def forget_prompt(self) -> None:
        """Drops what is kept of the last prompt: the next request encodes its own, even if it is the same."""
        self._encoded = None

    def conditioning(self, geometry: ImageGeometry, schedule: Schedule, hidden_states: FloatArray) -> Conditioning:
        """What a denoiser is made from, for a prompt's hidden states [1, tokens, hidden_size]."""
        caption_tokens = padded(hidden_states.shape[1])
        return Conditioning(
            hidden_states=hidden_states,
            timesteps=schedule.timesteps,
            image_rotary=self._rotary(image_positions(geometry, caption_tokens)),
            caption_rotary=self._rotary(caption_positions(caption_tokens)),
        )

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
        channels = self.bundle.manifest.config.vae.latent_channels
        shape = (1, channels, geometry.latent_height, geometry.latent_width)
        return np.concatenate([TorchGenerator(seed).normals(shape) for seed in seeds])

    def _start(self, job: Job, seeds: tuple[int, ...], encoded: Encoded | None) -> tuple[FloatArray, Start | None]:
        """A batch's first latents: noise, or an image with noise, which may be needed after each step."""
        if job.source is None or encoded is None:
            return self.initial_latents(job.geometry, seeds), None
        clean, noise = encoded.sample(seeds, self.bundle.manifest.config.vae)
        start = Start(clean, noise, job.source.mask)
        return start.at(job.schedule.sigmas[job.first_step]), start

    def unscaled(self, latents: FloatArray) -> FloatArray:
        """Latents as the decoder takes them."""
        vae = self.bundle.manifest.config.vae
        return latents / np.float32(vae.scaling_factor) + np.float32(vae.shift_factor)

    def cancel(self) -> None:
        """Stops what this pipeline generates, from any thread: its streams raise `CancelledError` within moments."""
        for session in tuple(self._sessions):
            session.cancel()

    def release(self) -> None:
        """Frees all that is loaded; the next image loads it again."""
        self._encoded = None
        if self.choice.current is not None:
            self.choice.current.release()

    def close(self) -> None:
        """Frees everything for good and writes caches."""
        self._encoded = None
        self.choice.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or not issubclass(kind, DeviceLostError):  # whose clean-up may wait without end
            self.close()


def _notices(chosen: Chosen) -> tuple[NoticeEvent, ...]:
    choice = (NoticeEvent(chosen.why, warning=True),) if chosen.why and chosen.unexpected else ()
    return (*choice, *(NoticeEvent(note) for note in chosen.plan.notes))


def _parts(seeds: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    for first in range(0, len(seeds), size):
        yield seeds[first : first + size]


def to_image(values: FloatArray) -> "Image":
    """[3, height, width] in about -1 to 1 → 8-bit RGB, rounded as diffusers rounds. Raises `ExecutorError`."""
    from PIL import Image

    if not np.isfinite(values).all():
        raise ExecutorError("the decoder gave values that are not finite; verify the bundle")
    unit = np.clip(values * np.float32(0.5) + np.float32(0.5), 0, 1)
    pixels = np.rint(unit.transpose(1, 2, 0) * np.float32(255)).astype(np.uint8)
    return Image.fromarray(pixels)
