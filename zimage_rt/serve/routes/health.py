"""For those who watch over the server: is it alive, is it ready, and what does it do."""

import contextlib
import time

import psutil
from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ..service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    health = APIRouter(tags=["health"])

    @health.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The web process answers."""
        return {"status": "ok"}

    @health.get("/readyz", responses={503: {"description": "Not now."}})
    async def readyz() -> Response:
        """Requests for images are taken and would be run."""
        supervisor = service.supervisor
        if supervisor.stopping or supervisor.ready is None:
            why = "stopping" if supervisor.stopping else "the engine is starting"
            return JSONResponse({"status": why}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ready"})

    @health.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus's text format."""
        text = service.metrics.text(_gauges(service))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return health


def _gauges(service: Service) -> list[tuple[str, str, dict[str, float]]]:
    supervisor = service.supervisor
    queue = {
        '{state="running"}': float(supervisor.running is not None),
        '{state="waiting"}': float(len(supervisor.waiting)),
    }
    memory = {'{process="server"}': float(psutil.Process().memory_info().rss)}
    pid = None if supervisor.engine is None else supervisor.engine.pid
    if pid is not None:
        with contextlib.suppress(psutil.Error):  # it has just ended
            memory['{process="engine"}'] = float(psutil.Process(pid).memory_info().rss)
    return [
        ("zimage_queue_jobs", "Requests for images.", queue),
        ("zimage_memory_bytes", "Resident memory.", memory),
        ("zimage_ready", "Whether the engine is ready.", {"": float(supervisor.ready is not None)}),
        ("zimage_uptime_seconds", "Since the server started.", {"": time.time() - service.started}),
    ]
