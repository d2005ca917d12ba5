"""What the routes of all APIs share: from what a client asks to a job, and from a job to its images."""

import asyncio
import math
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.requests import Request

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Manifest
from zimage_runtime.errors import RequestError
from zimage_runtime.images.formats import ImageFormat
from zimage_runtime.model.config import PATCH_SIZE

from .event_stream import gone
from .gallery import Gallery
from .jobs import Job, State, new_id
from .lora_folder import LoraFolder
from .metrics import Metrics
from .orders import Order, Planned, Wanted
from .pictures import image_size
from .refusals import ClientGoneError, ConflictError, EngineFailedError, InvalidError, RefusalError, UnavailableError
from .settings import Settings
from .supervisor import Supervisor

_PRUNES_EVERY = 60.0  # seconds, where only the images' age decides


@dataclass
class Service:
    """One server."""

    settings: Settings
    manifest: Manifest
    gallery: Gallery
    metrics: Metrics = field(default_factory=Metrics)
    supervisor: Supervisor = field(init=False)
    loras: LoraFolder = field(init=False)
    started: float = field(default_factory=time.time)
    _pruned: float = 0.0
    _tasks: set[asyncio.Task[int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(self.settings, self.metrics, self._finished)
        self.loras = LoraFolder(self.settings.lora_dir)

    @classmethod
    def of(cls, settings: Settings) -> "Service":
        """Raises `BundleError` for a bundle that cannot be opened."""
        gallery = Gallery(settings.engine.output_dir, settings.keep)
        gallery.prune()
        return cls(settings, Bundle.open(settings.engine.bundle).manifest, gallery)

    @property
    def version(self) -> str:
        """Of the package."""
        try:
            return version("zimage-rt")
        except PackageNotFoundError:
            return "unknown"

    @property
    def turbo(self) -> bool:
        """Whether the model is distilled to few steps without guidance. Bundles that do not say are all Turbo."""
        return self.manifest.variant in (None, "turbo")

    def submit(
        self,
        request: Request,
        route: str,
        wanted: Wanted,
        *,
        kind: ImageFormat = ImageFormat.PNG,
        quality: int | None = None,
        previews: bool = True,
        partials: int = 0,
    ) -> Job:
        """Checks and queues. Raises `RefusalError`."""
        wanted = self.checked(wanted)
        client = client_of(request)
        lane = f"{client} {request.headers.get('user-agent', '')}"
        order = Order(id=new_id(), wanted=wanted, kind=kind, quality=quality, previews=previews, partials=partials)
        job = Job(order, client, lane, route)
        self.supervisor.submit(job)
        return job

    def checked(self, wanted: Wanted) -> Wanted:
        """The same with a size where an image decides it. Raises `InvalidError` for what this server would not run."""
        limits = self.settings.limits
        try:
            if wanted.image is not None:
                size = image_size(wanted.image, "the image", limits.max_source_pixels)
                wanted = wanted if wanted.size is not None else replace(wanted, size=self._fitted(*size))
            for what, data in (("the mask", wanted.mask), ("the control image", wanted.control)):
                if data is not None:
                    image_size(data, what, limits.max_source_pixels)
            limits.check(wanted, self.manifest)
        except RequestError as error:
            raise InvalidError(str(error)) from None
        return wanted

    def _fitted(self, width: int, height: int) -> tuple[int, int]:
        """A source image's own size in multiples of 16, no larger in area than the bundle's default."""
        defaults, multiple = self.manifest.defaults, self.multiple
        scale = min(1.0, math.sqrt(defaults.width * defaults.height / (width * height)))
        sides = (max(int(side * scale) // multiple, 1) * multiple for side in (width, height))
        return next(sides), next(sides)

    @property
    def multiple(self) -> int:
        """Pixels of which sides are multiples."""
        return self.manifest.config.vae.scale * PATCH_SIZE

    async def plan(self, wanted: Wanted) -> Planned:
        """What a request would take. Raises `RefusalError`."""
        return await self.supervisor.plan(self.checked(wanted))

    async def finish(self, job: Job, request: Request) -> None:
        """Waits for a job, and cancels it when its client leaves.

        Raises `RefusalError` for a job that failed or was cancelled, and `ClientGoneError`.
        """
        over = asyncio.ensure_future(job.over())
        leaving = asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait((over, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()
            leaving.cancel()
            if not job.state.over:
                self.supervisor.cancel(job)
        if not job.state.over:
            raise ClientGoneError
        if (error := failure(job)) is not None:
            raise error

    async def read(self, name: str) -> bytes:
        """The bytes of an image that was made. Raises `EngineFailedError` if it was removed since."""
        data = await asyncio.to_thread(self.gallery.read, name)
        if data is None:
            raise EngineFailedError("the image was removed before it could be sent")
        return data

    def _finished(self, job: Job) -> None:
        """Makes room after a job that wrote images."""
        keep = self.settings.keep
        recently = time.monotonic() - self._pruned < _PRUNES_EVERY
        if not job.images or (keep.count is None and (keep.days is None or recently)):
            return
        self._pruned = time.monotonic()
        pinned = {made.name for one in self.supervisor.jobs if one.pins or not one.state.over for made in one.images}
        pinned |= {made.name for made in job.images}
        task = asyncio.ensure_future(asyncio.to_thread(self.gallery.prune, pinned))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def failure(job: Job) -> RefusalError | None:
    """The error that a job ended with."""
    message = job.error or ""
    match job.state:
        case State.CANCELLED:
            return ConflictError("the request was cancelled")
        case State.FAILED if job.refused:
            return InvalidError(message)
        case State.FAILED if not job.began and not job.attempts:
            return UnavailableError(message, retry_after=10)
        case State.FAILED:
            return EngineFailedError(message)
    return None


def client_of(request: Request) -> str:
    """The address that a request comes from."""
    return request.client.host if request.client else "unknown"


def job_document(job: Job) -> dict[str, Any]:
    """A job as the API lists it."""
    wanted = job.order.wanted
    width, height = wanted.size or (None, None)
    return {
        "id": job.id,
        "state": job.state.value,
        "position": job.position,
        "prompt": wanted.prompt,
        "width": width,
        "height": height,
        "count": wanted.count,
        "step": job.step,
        "steps": job.steps,
        "error": job.error,
        "images": [image_document(job, at) for at in range(len(job.images))],
    }


def image_document(job: Job, at: int) -> dict[str, Any]:
    """An image of a job as the API shows it."""
    made = job.images[at]
    return {
        "index": made.index,
        "name": made.name,
        "url": f"/images/{made.name}",
        "width": made.width,
        "height": made.height,
        "seed": made.seed,
        "settings": made.settings,
    }
