"""The web application: the routes, the errors, and what guards them."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from .answers import error_response, plain_error
from .bodies import Bodies
from .guard import Guard
from .refusals import ClientGoneError, RefusalError
from .routes import a1111, a1111_lists, docs, files, health, native, openai
from .service import Service

_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large"}


def make_app(service: Service) -> ASGIApp:
    """The application of a service."""

    app = FastAPI(
        title="zimage-rt",
        version=service.version,
        docs_url=None,  # which would load scripts from elsewhere
        redoc_url=None,
    )
    for module in (files, docs, health, native, openai, a1111, a1111_lists):
        app.include_router(module.router(service))
    _handle_errors(app)
    return Guard(Bodies(app, service.settings.limits), service.settings, service.metrics)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusalError)
    async def refused(request: Request, error: RefusalError) -> Response:
        return error_response(request.url.path, error)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # nginx's; nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return plain_error(request.url.path, 500, "internal_error", "the server failed; its log says more")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        param = ".".join(where) or None
        message = f"{param}: {first['msg']}" if param else first["msg"]
        return plain_error(request.url.path, 422, "invalid_value", message, param=param)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        wait = (error.headers or {}).get("Retry-After")
        code = _CODES.get(error.status_code, "error")
        headers = {key: value for key, value in (error.headers or {}).items() if key != "Retry-After"}
        retry_after = None if wait is None else int(wait)
        return plain_error(request.url.path, error.status_code, code, str(error.detail), retry_after, headers)
