"""The way of an image, from prompt to pixels, as a generator.

The caller gets an event after the caption, after each step and with each image, and so owns progress, previews,
timing and cancelling. The latents live here, in float32 numpy, where the Euler step is one line.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from .arrays import FloatArray
from .bundle.bundle import Bundle
from .bundle.hub import bundle_directory
from .bundle.tensors import TensorFile, to_float32
from .errors import BundleError, ExecutorError, RequestError
from .events import CaptionEvent, EncodeEvent, Event, ImageEvent, NoticeEvent, Request, Result, StepEvent, Timings
from .executors.choose import choose, make_executor
from .executors.protocol import Conditioning, Executor, Plan
from .images.img2img import DEFAULT_MASKED_STRENGTH, DEFAULT_STRENGTH, Encoded, Start, steps_skipped
from .images.source_image import ImageInput, open_given
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
from .model.noise import MAX_SEED, TorchGenerator
from .model.programs import Program
from .model.schedule import Schedule, make_schedule
from .model.tokenizer import PromptTokenizer
from .tiles.tiling import TiledDecoder, TiledEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_COUNT",
    "CaptionEvent",
    "EncodeEvent",
    "Event",
    "ImageEvent",
    "NoticeEvent",
    "Pipeline",
    "Request",
    "Result",
    "StepEvent",
    "Timings",
    "to_image",
]

MAX_COUNT = 10_000
"""Images of one request."""


@dataclass
class Pipeline:
    """A bundle and the executor that runs it. Make one with `from_bundle`."""

    bundle: Bundle
    executor: Executor
    keep_loaded: bool = True
    low_memory: bool = False  # as the executor has it
    why: str = "asked for"  # it is that executor
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
        note: Callable[[str], object] = lambda text: None,
    ) -> Self:
        """Opens a bundle: a directory, or a name on the Hub, ``ORG/NAME``, whose files are fetched into the cache
        of huggingface_hub. Nothing large is read yet.

        `executor` is "tensorrt", "cuda", "cpu", or "auto": the best that can run here, and `why` says why. `vram` is a
        budget in bytes for executors on a GPU; by default it is what is free there now. With `low_memory`, weights on
        the CPU stay mapped from the file. With `keep_loaded`, what fits in memory stays loaded between images;
        without it, each stage is freed when its last use is over. `note` is told, a line each, of what is done once
        and takes a while.

        Raises `BundleError`, `HubError`, or `RequestError` for an executor that cannot run here.
        """
        bundle = Bundle.open(bundle_directory(path))
        choice = choose(bundle, executor)
        made = make_executor(bundle, choice, vram, low_memory=low_memory, note=note)
        return cls(bundle, made, keep_loaded, low_memory, choice.why)

    def request(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        count: int = 1,
        batch_size: int = 1,
        image: ImageInput | None = None,
        strength: float | None = None,
        mask: ImageInput | None = None,
    ) -> Request:
        """Checks a request, fills in the bundle's defaults and reads the images. Raises `RequestError`."""
        manifest = self.bundle.manifest
        if image is None and (strength is not None or mask is not None):
            raise RequestError("a strength or a mask is for an image to start from, which is missing")
        given = None if image is None else open_given(image, mask)
        if size is None and given is not None:
            size = given.own_size(manifest.config.vae)
        width, height = size or (manifest.defaults.width, manifest.defaults.height)
        if not 1 <= count <= MAX_COUNT or batch_size < 1:
            raise RequestError(f"the count of images must be 1 to {MAX_COUNT}, and the batch size at least 1")
        first = secrets.randbelow(2**32 - count) if seed is None else seed
        if not 0 <= first <= MAX_SEED - count + 1:
            raise RequestError(f"seeds must be 0 to {MAX_SEED}, not {first} to {first + count - 1}")
        request = Request(
            prompt=prompt,
            geometry=image_geometry(width, height, manifest.config),
            schedule=make_schedule(manifest.defaults.steps if steps is None else steps, manifest.config.scheduler),
            seeds=tuple(range(first, first + count)),
            batch_size=min(batch_size, count),
        )
        if given is None:
            return request
        if strength is None:
            strength = DEFAULT_STRENGTH if mask is None else DEFAULT_MASKED_STRENGTH
        skipped = steps_skipped(request.schedule.steps, strength)
        source = given.resized(width, height, manifest.config.vae)
        return replace(request, source=source, strength=strength, first_step=skipped)

    def generate(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        count: int = 1,
        batch_size: int = 1,
        image: ImageInput | None = None,
        strength: float | None = None,
        mask: ImageInput | None = None,
    ) -> Result:
        """Generates `count` images of `size` (width, height) in pixels with the seeds `seed`, `seed` + 1, ….

        A seed gives the image that diffusers generates with ``torch.Generator("cpu").manual_seed(seed)``; without
        one, a random seed is used. `image` (a file, or Pillow's) is an image to start from, resized to `size`, which by
        default is its own, cut to multiples of 16; the more `strength` (up to 1; by default 0.6, with a mask 1), the
        less of it is left, and the more of the `steps` are taken. Where `mask` is black, the image is kept.

        Raises `RequestError`, `MemoryLimitError` (both before anything is loaded) or `ExecutorError`.
        """
        start = time.perf_counter()
        caption = 0.0
        steps_taken: list[float] = []
        images: list[ImageEvent] = []
        encode = 0.0
        for event in self.stream(prompt, size, steps, seed, count, batch_size, image, strength, mask):
            match event:
                case EncodeEvent():
                    encode = event.seconds
                case CaptionEvent():
                    caption = event.seconds
                case StepEvent():
                    steps_taken.append(event.seconds)
                case ImageEvent():
                    images.append(event)
        timings = Timings(
            caption, tuple(steps_taken), tuple(p.seconds for p in images), time.perf_counter() - start, encode
        )
        return Result([p.image for p in images], [p.seed for p in images], timings)

    def stream(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        count: int = 1,
        batch_size: int = 1,
        image: ImageInput | None = None,
        strength: float | None = None,
        mask: ImageInput | None = None,
    ) -> Iterator[Event]:
        """The same as `generate`, event by event. The request is checked now, not at the first event."""
        return self.run(self.request(prompt, size, steps, seed, count, batch_size, image, strength, mask))

    def run(self, request: Request) -> Iterator[Event]:
        """Runs a checked request. Raises `RequestError` at once where the prompt or the memory does not allow it."""
        ids, cut = self._tokenizer.encode_counted(request.prompt)
        plan = self.executor.plan(request.geometry, len(ids), request.batch_size, encodes=request.source is not None)
        return self._events(request, ids, cut, plan)

    def _events(self, request: Request, ids: list[int], cut: int, plan: Plan) -> Iterator[Event]:
        release_early = not (plan.keep_all and self.keep_loaded)
        yield from (NoticeEvent(note) for note in plan.notes)
        encoded = None
        if request.source is not None:
            begin = time.perf_counter()
            encoded = self.encode(request.source.pixels, tiled=plan.encodes_tiled)
            if release_early:
                self.executor.release(Program.ENCODER)
            yield EncodeEvent(time.perf_counter() - begin)
        begin = time.perf_counter()
        hidden_states = self.encode_prompt(ids)
        if release_early:
            self.executor.release(Program.TEXT_ENCODER)
        denoiser = self.executor.prepare(self.conditioning(request.geometry, request.schedule, hidden_states))
        if release_early:
            self.executor.release(Program.CAPTION, Program.MODULATION)
        yield CaptionEvent(len(ids), cut, time.perf_counter() - begin)
        for first in range(0, len(request.seeds), request.batch_size):
            seeds = request.seeds[first : first + request.batch_size]
            latents, start = self._start(request, seeds, encoded)
            for step in range(request.first_step, request.schedule.steps):
                begin = time.perf_counter()
                velocity = denoiser(latents, step)
                latents = latents + request.schedule.step_size(step) * velocity
                if start is not None:
                    latents = start.kept(latents, request.schedule.sigmas[step + 1])
                if not np.isfinite(latents).all():
                    raise ExecutorError(f"step {step + 1} gave values that are not finite; verify the bundle")
                taken = step + 1 - request.first_step
                yield StepEvent(seeds, taken, request.steps, latents, time.perf_counter() - begin)
            last = first + request.batch_size >= len(request.seeds)
            release_now = not plan.keep_all or (last and not self.keep_loaded)
            if release_now:
                self.executor.release(Program.DENOISER)
            for seed, one in zip(seeds, latents, strict=True):
                begin = time.perf_counter()
                image = to_image(self.decode(one[None], tiled=plan.tiled)[0])
                yield ImageEvent(seed, image, one, time.perf_counter() - begin)
            if release_now:
                self.executor.release(Program.DECODER)

    def encode_prompt(self, ids: list[int]) -> FloatArray:
        """The text encoder's hidden states of a prompt: [1, tokens, hidden_size]."""
        rotary = text_rotary(len(ids), self.bundle.manifest.config.text_encoder)
        return self.executor.encode_text(self.embed(ids), rotary)

    def conditioning(self, geometry: ImageGeometry, schedule: Schedule, hidden_states: FloatArray) -> Conditioning:
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

    def embed(self, ids: list[int]) -> FloatArray:
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

    def initial_latents(self, geometry: ImageGeometry, seeds: tuple[int, ...]) -> FloatArray:
        """The noise that each seed starts from: [seeds, channels, height / 8, width / 8]."""
        channels = self.bundle.manifest.config.vae.latent_channels
        shape = (1, channels, geometry.latent_height, geometry.latent_width)
        return np.concatenate([TorchGenerator(seed).normals(shape) for seed in seeds])

    def _start(
        self, request: Request, seeds: tuple[int, ...], encoded: Encoded | None
    ) -> tuple[FloatArray, Start | None]:
        """A batch's first latents: noise, or an image with noise, which may be needed after each step."""
        if request.source is None or encoded is None:
            return self.initial_latents(request.geometry, seeds), None
        clean, noise = encoded.sample(seeds, self.bundle.manifest.config.vae)
        start = Start(clean, noise, request.source.mask)
        return start.at(request.schedule.sigmas[request.first_step]), start

    def encode(self, image: FloatArray, *, tiled: bool = False) -> Encoded:
        """An image [1, 3, height, width] in -1 to 1 → the distribution of its latents.

        `tiled` takes less memory and more time, and gives the same.
        """
        if tiled:
            self.executor.release(Program.ENCODER)
            vae, kernels = self.bundle.manifest.config.vae, self.executor.tile_kernels()
            return Encoded(*TiledEncoder(vae, self._vae_weights(), kernels)(image))
        return Encoded(*self.executor.encode(image))

    def _vae_weights(self) -> TensorFile:
        return TensorFile(self.bundle.file(self.bundle.manifest.weights["vae"]))

    def decode(self, latents: FloatArray, *, tiled: bool = False) -> FloatArray:
        """Latents [batch, channels, h, w] → images [batch, 3, 8h, 8w], about -1 to 1.

        `tiled` takes less memory and more time, and gives the same image.
        """
        vae = self.bundle.manifest.config.vae
        unscaled = latents / np.float32(vae.scaling_factor) + np.float32(vae.shift_factor)
        if tiled:
            self.executor.release(Program.DECODER)
            return TiledDecoder(vae, self._vae_weights(), self.executor.tile_kernels())(unscaled)
        return self.executor.decode(unscaled)

    def release(self) -> None:
        """Frees all that is loaded; the next image loads it again."""
        self.executor.release()


def to_image(values: FloatArray) -> "Image":
    """[3, height, width] in about -1 to 1 → 8-bit RGB, rounded as diffusers rounds. Raises `ExecutorError`."""
    from PIL import Image

    if not np.isfinite(values).all():
        raise ExecutorError("the decoder gave values that are not finite; verify the bundle")
    unit = np.clip(values * np.float32(0.5) + np.float32(0.5), 0, 1)
    pixels = np.rint(unit.transpose(1, 2, 0) * np.float32(255)).astype(np.uint8)
    return Image.fromarray(pixels)
