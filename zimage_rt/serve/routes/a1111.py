"""A1111's API: generating, progress, interrupting."""

import asyncio
import base64
import json
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..jobs import Job, State
from ..late_answer import json_answer
from ..refusals import ConflictError
from ..service import Service, client_of
from .a1111_bodies import GenerationBody, ImageBody, Read, TextBody, read

_ROUTE = "a1111"
_NOT_ECHOED = {"init_images", "mask"}


def router(service: Service) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/sdapi/v1", tags=["A1111"])

    @api.post("/txt2img")
    async def txt2img(request: Request, body: TextBody) -> Response:
        """Generates images from a prompt."""
        return await _answer(service, request, body)

    @api.post("/img2img")
    async def img2img(request: Request, body: ImageBody) -> Response:
        """Generates images from an image, and with a mask within its white areas."""
        return await _answer(service, request, body)

    @api.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        """How far the client's own request is."""
        return _progress(_own(service, request), preview=not skip_current_image)

    @api.post("/interrupt")
    async def interrupt(request: Request) -> dict[str, Any]:
        """Cancels the client's own request; what is done of it is its answer."""
        job = _own(service, request)
        if job is not None:
            service.supervisor.cancel(job)
        return {}

    return api


async def _answer(service: Service, request: Request, body: GenerationBody) -> Response:
    asked = read(service, body)
    job = service.submit(request, _ROUTE, asked.wanted)
    return await json_answer(request.url.path, _images(service, request, body, asked, job))


async def _images(service: Service, request: Request, body: GenerationBody, asked: Read, job: Job) -> dict[str, Any]:
    with job.pinned():
        try:
            await service.finish(job, request)
        except ConflictError:  # interrupted: A1111 answers with what there is
            if not job.images:
                raise
        files = [await service.read(made.name) for made in job.images] if body.send_images is not False else []
        images = await asyncio.to_thread(lambda: [base64.b64encode(data).decode() for data in files])
    echoed = body.model_dump(exclude=_NOT_ECHOED)
    return {"images": images, "parameters": echoed, "info": json.dumps(_info(service, job, asked))}


def _info(service: Service, job: Job, asked: Read) -> dict[str, Any]:
    """What A1111 says of the images, as its ``Processed.js`` has it. `comments` says what was done otherwise."""
    images = job.images
    first = images[0].settings
    count = len(images)
    variation = first["variation_seed"]
    return {
        "prompt": first["prompt"],
        "all_prompts": [first["prompt"]] * count,
        "negative_prompt": first["negative_prompt"],
        "all_negative_prompts": [first["negative_prompt"]] * count,
        "seed": images[0].seed,
        "all_seeds": [made.seed for made in images],
        "subseed": -1 if variation is None else variation,
        "all_subseeds": [-1 if variation is None else made.settings["variation_seed"] for made in images],
        "subseed_strength": first["variation_strength"] or 0,
        "width": images[0].width,
        "height": images[0].height,
        "sampler_name": first["sampler"],
        "cfg_scale": first["cfg_scale"],
        "steps": first["steps"],
        "batch_size": count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": service.manifest.name,
        "sd_model_hash": service.manifest.fingerprint[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first["strength"] or 0,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [made.parameters for made in images],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"zimage-rt {service.version}",
        "comments": "\n".join((*asked.notes, *job.notices)),
    }


def _own(service: Service, request: Request) -> Job | None:
    """A client's request over this API that runs, or else the first that waits."""
    client = client_of(request)
    mine = [one for one in service.supervisor.jobs if one.route == _ROUTE and one.client == client]
    running = (one for one in mine if one.state is State.RUNNING)
    return next(running, next((one for one in mine if one.state is State.WAITING), None))


def _progress(job: Job | None, *, preview: bool) -> dict[str, Any]:
    share = 0.0 if job is None or not job.steps else job.step / job.steps
    latest = None if job is None else job.latest
    image = latest.preview if preview and latest is not None else None
    return {
        "progress": min(share, 0.99),
        "eta_relative": 0.0 if job is None else job.eta,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": "" if job is None else job.id,
            "job_count": 0 if job is None else job.order.wanted.count,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": 0 if latest is None else latest.index,
            "sampling_step": 0 if latest is None else latest.step,
            "sampling_steps": 0 if latest is None else latest.steps,
        },
        "current_image": None if image is None else base64.b64encode(image).decode(),
        "textinfo": None,
    }
