"""The page's files and the images. Both are looked up by names that exist, never by a path."""

import asyncio
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from ..gallery import media_type
from ..refusals import MissingError
from ..service import Service

_PAGE = Path(__file__).parents[1] / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
"""What the page may consist of; the system's own table of types differs from machine to machine."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy: nothing from elsewhere, and no script or style within the HTML."""


def router(service: Service) -> APIRouter:
    """The routes."""
    files = APIRouter(tags=["files"])

    @files.get("/", include_in_schema=False)
    @files.head("/", include_in_schema=False)
    async def index() -> Response:
        return _page_file("index.html")

    @files.get("/page/{name:path}", include_in_schema=False)
    async def page(name: str) -> Response:
        return _page_file(name)

    @files.get("/images/{name}", response_class=FileResponse)
    async def image(name: str) -> Response:
        """An image that was made. Its name is its key."""
        path = await asyncio.to_thread(service.gallery.path, name)
        if path is None:
            raise MissingError(f"there is no image {name!r}")
        headers = {"Cache-Control": "private, max-age=31536000, immutable", "Content-Security-Policy": POLICY}
        return FileResponse(path, media_type=media_type(name), headers=headers)

    return files


@cache
def _page_files() -> dict[str, Path]:
    files = _PAGE.rglob("*") if _PAGE.is_dir() else ()
    return {path.relative_to(_PAGE).as_posix(): path for path in files if path.suffix in _TYPES}


def _page_file(name: str) -> Response:
    path = _page_files().get(name)
    if path is None:
        raise MissingError(f"there is no page {name!r}")
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=headers)
