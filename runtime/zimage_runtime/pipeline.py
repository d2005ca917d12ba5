"""The way of a picture, from prompt to pixels, as a generator.

The caller gets an event after the caption, after each step and with each picture, and so owns progress, previews,
timing and cancelling. The latents live here, in float32 numpy, where the Euler step is one line.
"""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .contracts import Program
from .errors import BundleError, ExecutorError, RequestError
from .executor import Conditioning, Executor, Floats, Plan, Planner
from .geometry import (
    PictureGeometry,
    Rotary,
    caption_positions,
    image_positions,
    padded,
    picture_geometry,
    text_rotary,
    transformer_rotary,
)
from .hub import bundle_directory
from .manifest import CPU, TENSORRT
from .memory import plan_memory
from .noise import MAX_SEED, TorchGenerator
from .schedule import Schedule, make_schedule
from .tensors import TensorFile, to_float32
from .tiling import TiledDecoder
from .tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_COUNT = 10_000
"""Pictures of one request."""


@dataclass(frozen=True)
class CaptionEvent:
    """The prompt is encoded."""

    tokens: int  # of the prompt in its template
    cut_tokens: int  # beyond the 512 that the model sees
    seconds: float  # since the request began


@dataclass(frozen=True)
class StepEvent:
    """A denoising step is done."""

    seeds: tuple[int, ...]  # of the pictures in the batch
    step: int  # counted from 1
    steps: int
    latents: Floats  # [batch, channels, height / 8, width / 8]; the caller must not write to them
    seconds: float  # that the step took


@dataclass(frozen=True)
class PictureEvent:
    """A picture is decoded."""

    seed: int
    image: "Image"
    latents: Floats  # [channels, height / 8, width / 8], after the last step
    seconds: float  # that decoding took


Event = CaptionEvent | StepEvent | PictureEvent


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage took, loading included; one entry a step and a picture."""

    caption: float
    steps: tuple[float, ...]
    decode: tuple[float, ...]
    total: float


@dataclass(frozen=True)
class Result:
    """What `generate` returns: as many pictures as seeds."""

    images: list["Image"]
    seeds: list[int]
    timings: Timings


@dataclass(frozen=True)
class Request:
    """A request whose values are checked and whose defaults are filled in."""

    prompt: str
    geometry: PictureGeometry
    schedule: Schedule
    seeds: tuple[int, ...]
    batch_size: int = 1


@dataclass
class Pipeline:
    """A bundle and the executor that runs it. Make one with `from_bundle`."""

    bundle: Bundle
    executor: Executor
    keep_loaded: bool = True
    low_memory: bool = False  # as the executor has it
    _tokenizer: PromptTokenizer = field(init=False, repr=False)
    _embeddings: TensorFile = field(init=False, repr=False)

    def __post_init__(self) -> None:
        manifest = self.bundle.manifest
        self._tokenizer = PromptTokenizer(self.bundle.file(manifest.tokenizer))
        self._embeddings = TensorFile(self.bundle.file(manifest.embeddings))

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        executor: str = "auto",
        vram: int | None = None,
        *,
        low_memory: bool = False,
        keep_loaded: bool = True,
    ) -> Self:
        """Opens a bundle: a directory, or a name on the Hub, ``ORG/NAME``, whose files are fetched into the cache
        of huggingface_hub. Nothing large is read yet.

        `executor` is "auto", "cpu" or "tensorrt". `vram` is a budget in bytes for executors on a GPU, by default
        what is free there. With `low_memory`, weights stay mapped from the file. With `keep_loaded`, what fits in
        memory stays loaded between pictures; without it, each stage is freed when its last use is over.

        Raises `BundleError`, `HubError`, or `RequestError` for an executor that is not here.
        """
        from .ort import OrtCpuExecutor

        bundle = Bundle.open(bundle_directory(path))
        if executor == TENSORRT:
            from .tensorrt.executor import open_executor

            return cls(bundle, open_executor(bundle, vram), keep_loaded, low_memory)
        if executor not in ("auto", CPU):
            raise RequestError(f"executor {executor!r} is not available; this version runs on 'cpu' and 'tensorrt'")
        if vram is not None:
            raise RequestError("vram is a budget for executors on a GPU; the cpu executor has none")
        return cls(bundle, OrtCpuExecutor(bundle, low_memory=low_memory), keep_loaded, low_memory)

    def request(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        count: int = 1,
        batch_size: int = 1,
    ) -> Request:
        """Checks a request and fills in the bundle's defaults. Raises `RequestError`."""
        manifest = self.bundle.manifest
        width, height = size or (manifest.defaults.width, manifest.defaults.height)
        if not 1 <= count <= MAX_COUNT or batch_size < 1:
            raise RequestError(f"the count of pictures must be 1 to {MAX_COUNT}, and the batch size at least 1")
        first = secrets.randbelow(2**32 - count) if seed is None else seed
        if not 0 <= first <= MAX_SEED - count + 1:
            raise RequestError(f"seeds must be 0 to {MAX_SEED}, not {first} to {first + count - 1}")
        return Request(
            prompt=prompt,
            geometry=picture_geometry(width, height, manifest.config),
            schedule=make_schedule(manifest.defaults.steps if steps is None else steps, manifest.config.scheduler),
            seeds=tuple(range(first, first + count)),
            batch_size=min(batch_size, count),
        )

    def generate(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        count: int = 1,
        batch_size: int = 1,
    ) -> Result:
        """Draws `count` pictures of `size` (width, height) in pixels with the seeds `seed`, `seed` + 1, ….

        A seed gives the picture that diffusers draws with ``torch.Generator("cpu").manual_seed(seed)``; without
        one, a seed is drawn. Raises `RequestError`, `MemoryLimitError` (both before anything is loaded) or
        `ExecutorError`.
        """
        start = time.perf_counter()
        caption = 0.0
        steps_taken: list[float] = []
        pictures: list[PictureEvent] = []
        for event in self.stream(prompt, size, steps, seed, count, batch_size):
            match event:
                case CaptionEvent():
                    caption = event.seconds
                case StepEvent():
                    steps_taken.append(event.seconds)
                case PictureEvent():
                    pictures.append(event)
        timings = Timings(caption, tuple(steps_taken), tuple(p.seconds for p in pictures), time.perf_counter() - start)
        return Result([p.image for p in pictures], [p.seed for p in pictures], timings)

    def stream(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        count: int = 1,
        batch_size: int = 1,
    ) -> Iterator[Event]:
        """The same as `generate`, event by event. The request is checked now, not at the first event."""
        return self.run(self.request(prompt, size, steps, seed, count, batch_size))

    def run(self, request: Request) -> Iterator[Event]:
        """Draws a checked request. Raises `RequestError` at once where the prompt or the memory does not allow it."""
        start = time.perf_counter()
        ids, cut = self._tokenizer.encode_counted(request.prompt)
        plan = self._plan(request, len(ids))
        return self._events(request, ids, cut, plan, start)

    def _plan(self, request: Request, tokens: int) -> Plan:
        if isinstance(self.executor, Planner):
            return self.executor.plan(request.geometry, tokens, request.batch_size)
        return plan_memory(
            self.bundle.manifest, request.geometry, tokens, request.batch_size, low_memory=self.low_memory
        )

    def _events(self, request: Request, ids: list[int], cut: int, plan: Plan, start: float) -> Iterator[Event]:
        release_early = not (plan.keep_all and self.keep_loaded)
        hidden_states = self.encode_prompt(ids)
        if release_early:
            self.executor.release(Program.TEXT_ENCODER)
        denoiser = self.executor.prepare(self.conditioning(request.geometry, request.schedule, hidden_states))
        if release_early:
            self.executor.release(Program.CAPTION, Program.MODULATION)
        yield CaptionEvent(len(ids), cut, time.perf_counter() - start)
        for first in range(0, len(request.seeds), request.batch_size):
            seeds = request.seeds[first : first + request.batch_size]
            latents = self.initial_latents(request.geometry, seeds)
            for step in range(request.schedule.steps):
                begin = time.perf_counter()
                velocity = denoiser(latents, step)
                latents = latents + request.schedule.step_size(step) * velocity
                if not np.isfinite(latents).all():
                    raise ExecutorError(f"step {step + 1} gave values that are not finite; verify the bundle")
                yield StepEvent(seeds, step + 1, request.schedule.steps, latents, time.perf_counter() - begin)
            last = first + request.batch_size >= len(request.seeds)
            release_now = not plan.keep_all or (last and not self.keep_loaded)
            if release_now:
                self.executor.release(Program.DENOISER)
            for seed, one in zip(seeds, latents, strict=True):
                begin = time.perf_counter()
                image = to_image(self.decode(one[None], tiled=plan.tiled)[0])
                yield PictureEvent(seed, image, one, time.perf_counter() - begin)
            if release_now:
                self.executor.release(Program.DECODER)

    def encode_prompt(self, ids: list[int]) -> Floats:
        """The text encoder's hidden states of a prompt: [1, tokens, hidden_size]."""
        rotary = text_rotary(len(ids), self.bundle.manifest.config.text_encoder)
        return self.executor.encode_text(self.embed(ids), rotary)

    def conditioning(self, geometry: PictureGeometry, schedule: Schedule, hidden_states: Floats) -> Conditioning:
        """What the executor is prepared with, for a prompt's hidden states [1, tokens, hidden_size]."""
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

    def embed(self, ids: list[int]) -> Floats:
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
        return to_float32(table[ids], dtype)[None]

    def initial_latents(self, geometry: PictureGeometry, seeds: tuple[int, ...]) -> Floats:
        """The noise that each seed starts from: [seeds, channels, height / 8, width / 8]."""
        channels = self.bundle.manifest.config.vae.latent_channels
        shape = (1, channels, geometry.latent_height, geometry.latent_width)
        return np.concatenate([TorchGenerator(seed).normals(shape) for seed in seeds])

    def decode(self, latents: Floats, *, tiled: bool = False) -> Floats:
        """Latents [batch, channels, h, w] → pictures [batch, 3, 8h, 8w], about -1 to 1.

        `tiled` takes less memory and more time, and gives the same picture.
        """
        vae = self.bundle.manifest.config.vae
        unscaled = latents / np.float32(vae.scaling_factor) + np.float32(vae.shift_factor)
        if tiled:
            self.executor.release(Program.DECODER)
            return TiledDecoder(vae, TensorFile(self.bundle.file(self.bundle.manifest.weights["vae"])))(unscaled)
        return self.executor.decode(unscaled)

    def release(self) -> None:
        """Frees all that is loaded; the next picture loads it again."""
        self.executor.release()


def to_image(picture: Floats) -> "Image":
    """[3, height, width] in about -1 to 1 → 8-bit RGB, rounded as diffusers rounds. Raises `ExecutorError`."""
    from PIL import Image

    if not np.isfinite(picture).all():
        raise ExecutorError("the decoder gave values that are not finite; verify the bundle")
    unit = np.clip(picture * np.float32(0.5) + np.float32(0.5), 0, 1)
    pixels = np.rint(unit.transpose(1, 2, 0) * np.float32(255)).astype(np.uint8)
    return Image.fromarray(pixels)
