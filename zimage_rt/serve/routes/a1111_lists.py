"""A1111's API: what there is to choose from. Clients read these lists before their first image."""

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from zimage_runtime.model.sampling_names import SamplerName, SchedulerName

from ..refusals import InvalidError
from ..service import Service
from .a1111_bodies import AUTOMATIC


def router(service: Service) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    name, hash = service.manifest.name, service.manifest.fingerprint
    title = f"{name} [{hash[:10]}]"

    @api.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The one model."""
        return [
            {"title": title, "model_name": name, "hash": hash[:10], "sha256": hash, "filename": name, "config": None}
        ]

    @api.get("/options")
    async def options() -> dict[str, Any]:
        """The settings that clients look at."""
        return {
            "sd_model_checkpoint": title,
            "sd_checkpoint_hash": hash,
            "sd_vae": AUTOMATIC,
            "samples_format": "png",
            "CLIP_stop_at_last_layers": 1,
        }

    @api.post("/options")
    async def set_options(options: dict[str, Any]) -> Response:
        """Accepts any settings. There is one model, so that another one is refused."""
        wanted = options.get("sd_model_checkpoint")
        if isinstance(wanted, str) and wanted and wanted not in (title, name, hash, hash[:10]):
            raise InvalidError(f"there is no model {wanted!r}; this server has {title}")
        return JSONResponse(None)

    @api.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """How steps are taken."""
        return [{"name": one.label, "aliases": [one.value], "options": {}} for one in SamplerName]

    @api.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """How sigmas are chosen."""
        return [_scheduler(one) for one in SchedulerName]

    @api.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """The LoRA that prompts may name: `<lora:NAME:WEIGHT>`."""
        found = await asyncio.to_thread(service.loras.files)
        return [{"name": one, "alias": one, "path": file.name, "metadata": {}} for one, file in found.items()]

    @api.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        """None but A1111's own None."""
        return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4}]

    for path in ("/latent-upscale-modes", "/sd-vae", "/sd-modules"):
        api.add_api_route(path, _none, methods=["GET"], summary=f"There are no {path.strip('/')}.")
    return api


def _scheduler(one: SchedulerName) -> dict[str, Any]:
    label = one.label or AUTOMATIC
    name = one.value if one.label else AUTOMATIC.lower()
    return {"name": name, "label": label, "aliases": None, "default_rho": -1, "need_inner_model": False}


async def _none() -> list[dict[str, Any]]:
    return []
