"""OpenAI's Images API."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from zimage_runtime.errors import RequestError

from ..answers import one_line, openai_error
from ..event_stream import EventStream, ServerEvent
from ..jobs import EventName, Job
from ..late_answer import json_answer
from ..orders import Made, MaskKind, Stepped, Wanted
from ..pictures import from_base64
from ..refusals import InvalidError, MissingError
from ..service import Service, failure
from .openai_bodies import CommonBody, EditBody, GenerationBody, described, edit_schema, usage

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be run."},
    429: {"description": "Too many requests wait."},
}
_EDIT_DOCUMENT = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": edit_schema(form=True)},
            "application/json": {"schema": edit_schema(form=False)},
        },
    }
}
_FORM_LIMITS = {"max_files": 20, "max_fields": 100, "max_part_size": 1 << 20}


def router(service: Service) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/v1", tags=["OpenAI"], responses=_ERRORS)
    model = {
        "id": service.manifest.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "zimage-rt",
    }

    @api.get("/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [model]}

    @api.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The same by its name."""
        if name != model["id"]:
            raise MissingError(f"there is no model {name!r}; this server has {model['id']}")
        return model

    @api.post("/images/generations")
    async def generations(request: Request, body: GenerationBody) -> Response:
        """Generates images."""
        return await _answer(service, request, body, _wanted(service, body))

    @api.post("/images/edits", openapi_extra=_EDIT_DOCUMENT)
    async def edits(request: Request) -> Response:
        """Generates images from an image, and with a mask within its transparent areas."""
        body, sources, mask = await _edit(request)
        if len(sources) != 1:
            raise InvalidError(f"image: this model starts from one image, not {len(sources)}")
        wanted = _wanted(
            service,
            body,
            image=sources[0],
            mask=mask,
            mask_kind=MaskKind.TRANSPARENT,
            strength=body.strength,
            mask_grow=body.mask_grow or 0,
        )
        return await _answer(service, request, body, wanted)

    return api


def _wanted(service: Service, body: CommonBody, **more: Any) -> Wanted:
    body.check()
    return Wanted(
        prompt=body.prompt,
        negative=body.negative_prompt or "",
        size=body.pixels(),
        steps=body.steps,
        cfg_scale=body.cfg_scale,
        sampler=body.sampler,
        scheduler=body.scheduler,
        shift=body.shift,
        seed=body.seed,
        count=1 if body.n is None else body.n,
        loras=service.loras.resolved([(one.name, one.weight) for one in body.loras or ()]),
        **more,
    )


async def _edit(request: Request) -> tuple[EditBody, list[bytes], bytes | None]:
    """The body of an edit, as a form or as JSON, and its image files."""
    if request.headers.get("content-type", "").startswith("application/json"):
        try:
            document = await request.json()
        except (ValueError, RecursionError):
            raise InvalidError("the body is not valid JSON") from None
        body = _validated(document)
        try:
            mask = body.mask_text()
            sources = [from_base64(text, "image") for text in body.sources()]
            return body, sources, None if mask is None else from_base64(mask, "mask")
        except RequestError as error:
            raise InvalidError(str(error)) from None
    fields: dict[str, Any] = {}
    sources = []
    mask_file = None
    async with request.form(**_FORM_LIMITS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                data = await value.read()
                if name in ("image", "image[]"):
                    sources.append(data)
                elif name == "mask":
                    mask_file = data
            elif name not in ("image", "image[]", "images", "mask"):
                fields[name] = value
    if isinstance(fields.get("loras"), str):
        try:
            fields["loras"] = json.loads(fields["loras"])
        except (ValueError, RecursionError):
            raise InvalidError("loras: is not valid JSON") from None
    return _validated(fields), sources, mask_file


def _validated(document: object) -> EditBody:
    try:
        return EditBody.model_validate(document)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


async def _answer(service: Service, request: Request, body: CommonBody, wanted: Wanted) -> Response:
    edited = wanted.image is not None
    partials = (body.partial_images or 0) if body.stream else 0
    job = service.submit(
        request, "openai", wanted, kind=body.kind, quality=body.output_compression, previews=False, partials=partials
    )
    if body.stream:
        return EventStream(_stream(service, body, job, edited=edited))
    return await json_answer(request.url.path, _images(service, request, body, job, edited=edited))


async def _images(service: Service, request: Request, body: CommonBody, job: Job, *, edited: bool) -> dict[str, Any]:
    with job.pinned():
        await service.finish(job, request)
        data = [await _datum(service, request, body, made) for made in job.images]
    return {
        "created": int(time.time()),
        "data": data,
        **described(body, job),
        "usage": usage(job, len(data), edited=edited),
    }


async def _datum(service: Service, request: Request, body: CommonBody, made: Made) -> dict[str, Any]:
    """An image of an answer, and its seed, which is an extension."""
    if body.by_url:
        return {"url": f"{request.base_url}images/{made.name}", "seed": made.seed}
    return {"b64_json": await asyncio.to_thread(_base64, await service.read(made.name)), "seed": made.seed}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def _stream(service: Service, body: CommonBody, job: Job, *, edited: bool) -> AsyncIterator[ServerEvent]:
    """Partial images as they come, and each image when it is done. A client that leaves cancels the job."""
    prefix = "image_edit" if edited else "image_generation"
    sent = 0
    with job.pinned():
        try:
            async for event in job.follow():
                common = {"created_at": int(time.time()), **described(body, job)}
                match event.name, event.what:
                    case EventName.STEP, Stepped(partial=bytes() as partial):
                        name = f"{prefix}.partial_image"
                        text = await asyncio.to_thread(_base64, partial)
                        yield ServerEvent(name, {"type": name, "b64_json": text, "partial_image_index": sent, **common})
                        sent += 1
                    case EventName.IMAGE, Made() as made:
                        name, sent = f"{prefix}.completed", 0
                        text = await asyncio.to_thread(_base64, await service.read(made.name))
                        tokens = usage(job, 1, edited=edited)
                        document = {"type": name, "b64_json": text, **common, "usage": tokens, "seed": made.seed}
                        yield ServerEvent(name, document)
                    case ((EventName.FAILED | EventName.CANCELLED), _) if (error := failure(job)) is not None:
                        document = openai_error(error.status, error.code, one_line(str(error)))
                        yield ServerEvent("error", {"type": "error", **document})
        finally:
            if not job.state.over:
                service.supervisor.cancel(job)
