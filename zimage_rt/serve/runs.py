"""One order at work in the engine: decode its images, generate, write each image, and report."""

import io
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_runtime.bundle.files import atomic_write
from zimage_runtime.errors import CancelledError
from zimage_runtime.images.formats import ImageFormat

from .gallery import new_name, settings_of
from .orders import FromEngine, Made, Noticed, Order, Staged, Started, Stepped
from .pictures import sources

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_runtime.pipeline import ImageEvent, Job, Pipeline, StepEvent

_PREVIEW_QUALITY = 80


class Run:
    """Runs an order. `say` sends what happens to the web process."""

    def __init__(
        self, order: Order, pipeline: "Pipeline", output_dir: Path, say: Callable[[FromEngine], object]
    ) -> None:
        self.order = order
        self.pipeline = pipeline
        self.output_dir = output_dir
        self.say = say
        self.image = -1  # the index of the one that is denoised
        self.made = 0

    def go(self, cancelled: Callable[[], bool]) -> None:
        """Raises what the pipeline raises, `CancelledError`, and `OSError` for an image that cannot be written."""
        from zimage_runtime.pipeline import CaptionEvent, EncodeEvent, ImageEvent, NoticeEvent, StepEvent

        id = self.order.id
        job = self._prepared()
        if cancelled():  # before the pipeline knew of the request; from here on it does
            raise CancelledError
        self.say(Started(id, job.steps, job.geometry.image_tokens))
        for event in self.pipeline.run(job):
            match event:
                case NoticeEvent():
                    self.say(Noticed(id, event.text))
                case EncodeEvent():
                    self.say(Staged(id, "encode", event.seconds))
                case CaptionEvent():
                    self._note_cuts(event.cut_tokens, event.negative_cut_tokens)
                    self.say(Staged(id, "caption", event.seconds, event.tokens))
                case StepEvent():
                    self._step(event, job)
                case ImageEvent():
                    self.say(Staged(id, "decode", event.seconds))
                    self._write(event)

    def _prepared(self) -> "Job":
        from PIL import Image

        wanted = self.order.wanted
        job = self.pipeline.prepare(wanted.request(*sources(wanted)))
        if self.order.kind is not ImageFormat.PNG:  # whose metadata holds any prompt
            from zimage_runtime.images.image_files import encode_image

            encode_image(Image.new("RGB", (1, 1)), self.order.kind, job.info)
        return job

    def _note_cuts(self, prompt: int, negative: int) -> None:
        for name, cut in (("prompt", prompt), ("negative prompt", negative)):
            if cut:
                self.say(Noticed(self.order.id, f"the {name} is too long: its last {cut} tokens were cut off"))

    def _step(self, event: "StepEvent", job: "Job") -> None:
        if event.step == 1:
            self.image += 1
        wanted = event.step in partial_steps(event.steps, self.order.partials)
        preview = event.preview() if event.colours is not None and (self.order.previews or wanted) else None
        partial = self._full_size(preview, job) if preview is not None and wanted else None
        small = _jpeg(preview) if preview is not None and self.order.previews else None
        self.say(Stepped(self.order.id, self.image, event.step, event.steps, event.seconds, small, partial))

    def _full_size(self, preview: "Image", job: "Job") -> bytes:
        from PIL.Image import Resampling

        image = preview.resize((job.geometry.width, job.geometry.height), Resampling.BICUBIC)
        return self._encoded(image, None)

    def _encoded(self, image: "Image", event: "ImageEvent | None") -> bytes:
        from zimage_runtime.images.image_files import encode_image

        return encode_image(image, self.order.kind, event.info if event else None, self.order.quality)

    def _write(self, event: "ImageEvent") -> None:
        begin = time.perf_counter()
        name = new_name(time.time(), self.made, secrets.token_hex(16), self.order.kind)
        with atomic_write(self.output_dir / name, overwrite=False) as file:
            file.write(self._encoded(event.image, event))
        self.say(Staged(self.order.id, "write", time.perf_counter() - begin))
        width, height = event.image.size
        settings, text = settings_of(event.info), event.info.parameters()
        self.say(Made(self.order.id, self.made, name, width, height, event.seed, settings, text))
        self.made += 1


def partial_steps(steps: int, partials: int) -> set[int]:
    """The steps after which partial images are sent: evenly spread, and never the last one."""
    return {step for at in range(1, partials + 1) if 0 < (step := steps * at // (partials + 1)) < steps}


def _jpeg(image: "Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_PREVIEW_QUALITY)
    return buffer.getvalue()
