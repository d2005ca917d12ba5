"""Our own API, which the page uses: jobs with events, plans, and the gallery."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from zimage_runtime.errors import RequestError
from zimage_runtime.model.sampling_names import SamplerName, SchedulerName

from ..event_stream import EventStream, ServerEvent
from ..jobs import EventName, Job, JobEvent
from ..orders import Made, Stepped, Wanted
from ..pictures import from_base64
from ..refusals import InvalidError, MissingError
from ..service import Service, image_document, job_document
from .named import NamedLora


class FromGallery(BaseModel):
    """An image that was made before."""

    model_config = ConfigDict(extra="forbid")
    gallery: str = Field(description="The image's name.")


class ControlBody(BaseModel):
    """What the server's ControlNet reads."""

    model_config = ConfigDict(extra="forbid")
    image: str | FromGallery = Field(description="Edges, depth, a pose: base64, a data URL, or a gallery's.")
    type: str | None = Field(None, description="canny: edges are made of the image first.")
    scale: float | None = Field(None, description="How much control there is; 0 is none.")
    start: float = Field(0.0, description="Share of the steps before which there is none.")
    end: float = Field(1.0, description="Share of the steps after which there is none.")


class JobBody(BaseModel):
    """What to generate. What is left out or null gets the bundle's default."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    sampler: str | None = None
    scheduler: str | None = None
    shift: float | None = None
    seed: int | None = Field(None, description="A random one where it is null.")
    count: int = Field(1, description="Images, with the seeds seed, seed + 1, …")
    variation_seed: int | None = None
    variation_strength: float | None = None
    loras: list[NamedLora] = []
    image: str | FromGallery | None = Field(None, description="A source image: base64, a data URL, or a gallery's.")
    mask: str | FromGallery | None = Field(None, description="White areas are repainted.")
    mask_grow: int = 0
    strength: float | None = None
    control: ControlBody | None = None


def router(service: Service) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api", tags=["zimage-rt"])

    @api.get("/state")
    async def state() -> dict[str, Any]:
        """What this server generates with, and what it allows."""
        return await asyncio.to_thread(_state, service)

    @api.post("/plan")
    async def plan(body: JobBody) -> dict[str, Any]:
        """What an image would take of the memory, without generating it."""
        planned = await service.plan(await _wanted(service, body))
        return {
            "fits": planned.fits,
            "message": planned.message,
            "plan": planned.document,
            "lines": list(planned.lines),
        }

    @api.post("/jobs", status_code=202)
    async def submit(request: Request, body: JobBody) -> dict[str, Any]:
        """Queues a job. Its events follow at `/api/jobs/ID/events`."""
        job = service.submit(request, "native", await _wanted(service, body))
        return {"id": job.id, "position": job.position}

    @api.get("/jobs")
    async def jobs() -> list[dict[str, Any]]:
        """What runs and what waits, in order."""
        running = service.supervisor.running
        each = [*([running] if running else []), *service.supervisor.waiting]
        return [job_document(job) for job in each]

    @api.get("/jobs/{id}")
    async def job(id: str) -> dict[str, Any]:
        """A job that waits, runs, or was over not long ago."""
        return job_document(_found(service, id))

    @api.delete("/jobs/{id}")
    async def cancel(id: str) -> dict[str, Any]:
        """Cancels a job. One that is over stays what it is."""
        found = _found(service, id)
        service.supervisor.cancel(found)
        return job_document(found)

    @api.get("/jobs/{id}/events", responses={200: {"content": {"text/event-stream": {}}}})
    async def events(id: str, last_event_id: Annotated[str | None, Header()] = None) -> Response:
        """A job's events from its beginning, or from `Last-Event-ID` on."""
        after = int(last_event_id) if last_event_id and last_event_id.isascii() and last_event_id.isdigit() else 0
        return EventStream(_events(_found(service, id), after))

    @api.get("/images")
    async def images(before: str | None = None, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> dict[str, Any]:
        """Images that were made, newest first."""
        found, more = await asyncio.to_thread(service.gallery.listed, before, limit)
        return {"images": [picture.document() for picture in found], "more": more}

    @api.delete("/images/{name}", status_code=204)
    async def remove(name: str) -> Response:
        """Removes an image for good."""
        if not await asyncio.to_thread(service.gallery.remove, name):
            raise MissingError(f"there is no image {name!r}")
        return Response(status_code=204)

    return api


def _state(service: Service) -> dict[str, Any]:
    settings, manifest, supervisor = service.settings, service.manifest, service.supervisor
    limits, defaults, ready = settings.limits, manifest.defaults, supervisor.ready
    return {
        "bundle": {
            "name": manifest.name,
            "model": manifest.source.name,
            "precision": manifest.precision.value,
            "variant": manifest.variant,
        },
        "executor": None if ready is None else ready.executor,
        "device": None if ready is None else ready.device,
        "defaults": {
            "width": defaults.width,
            "height": defaults.height,
            "steps": defaults.steps,
            "cfg_scale": defaults.cfg_scale,
            "sampler": SamplerName.EULER.value,
            "scheduler": SchedulerName.MODEL.value,
        },
        "limits": {
            "max_pixels": limits.max_pixels,
            "max_steps": limits.max_steps,
            "max_count": limits.max_count,
            "max_queue": limits.max_queue,
            "multiple": service.multiple,
        },
        "samplers": [one.value for one in SamplerName],
        "schedulers": [one.value for one in SchedulerName],
        "loras": [{"name": name} for name in service.loras.files()],
        "control": settings.engine.controlnet is not None,
        "previews": manifest.preview is not None,
        "queue": {"running": int(supervisor.running is not None), "waiting": len(supervisor.waiting)},
        "version": service.version,
        "needs_key": bool(settings.keys),
    }


async def _wanted(service: Service, body: JobBody) -> Wanted:
    """What a body asks for. Raises `RefusalError`."""
    if (body.width is None) != (body.height is None):
        raise InvalidError("give width and height, or neither")
    if (body.variation_seed is None) != (body.variation_strength is None):
        raise InvalidError("give variation_seed and variation_strength, or neither")
    loras = service.loras.resolved([(one.name, one.weight) for one in body.loras])
    return Wanted(
        prompt=body.prompt,
        negative=body.negative_prompt,
        size=None if body.width is None or body.height is None else (body.width, body.height),
        steps=body.steps,
        cfg_scale=body.cfg_scale,
        sampler=body.sampler,
        scheduler=body.scheduler,
        shift=body.shift,
        seed=body.seed,
        count=body.count,
        variation=None
        if body.variation_seed is None or body.variation_strength is None
        else (body.variation_seed, body.variation_strength),
        loras=loras,
        image=await _image(service, body.image, "the image"),
        mask=await _image(service, body.mask, "the mask"),
        mask_grow=body.mask_grow,
        strength=body.strength,
        **(await _control(service, body.control)),
    )


async def _control(service: Service, body: ControlBody | None) -> dict[str, Any]:
    if body is None:
        return {}
    folder = service.settings.engine.controlnet
    if folder is None:
        raise InvalidError("control: the server was started without --controlnet")
    return {
        "control": await _image(service, body.image, "the control image"),
        "controlnet": str(folder),
        "control_type": body.type,
        "control_scale": body.scale,
        "control_start": body.start,
        "control_end": body.end,
    }


async def _image(service: Service, given: str | FromGallery | None, what: str) -> bytes | None:
    if given is None:
        return None
    if isinstance(given, FromGallery):
        data = await asyncio.to_thread(service.gallery.read, given.gallery)
        if data is None:
            raise InvalidError(f"{what}: there is no image {given.gallery!r} in the gallery")
        return data
    try:
        return from_base64(given, what)
    except RequestError as error:
        raise InvalidError(str(error)) from None


def _found(service: Service, id: str) -> Job:
    job = service.supervisor.find(id)
    if job is None:
        raise MissingError(f"there is no job {id!r}, or it was over long ago")
    return job


async def _events(job: Job, after: int) -> AsyncIterator[ServerEvent]:
    async for event in job.follow(after):
        yield ServerEvent(event.name.value, _data(job, event), event.number)


def _data(job: Job, event: JobEvent) -> dict[str, Any]:
    match event.name, event.what:
        case EventName.QUEUED, int() as position:
            return {"position": position}
        case EventName.NOTICE, str() as text:
            return {"text": text}
        case EventName.STEP, Stepped() as step:
            return {"image": step.index, "step": step.step, "steps": step.steps, "preview": _data_url(step.preview)}
        case EventName.IMAGE, Made() as made:
            return image_document(job, made.index)
        case EventName.FAILED, str() as message:
            return {"message": message}
    return {}


def _data_url(preview: bytes | None) -> str | None:
    return None if preview is None else f"data:image/jpeg;base64,{base64.b64encode(preview).decode()}"
