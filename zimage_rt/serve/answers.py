"""Errors as answers, each in the form of the API that was called."""

from typing import Any

from starlette.responses import JSONResponse, Response

from zimage_runtime.command_line.progress import printable

from .refusals import RefusalError

OPENAI = "/v1/"
A1111 = "/sdapi/"
_MAX_LINE = 1000  # characters: a message may quote what was sent

_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_PHRASES = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 422: "Validation Error", 429: "Too Many Requests"}


def one_line(text: str) -> str:
    """A message that any client can show."""
    line = printable(" ".join(text.split()))
    return f"{line[:_MAX_LINE]} …" if len(line) > _MAX_LINE else line


def openai_error(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error of OpenAI's API."""
    kind = _OPENAI_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(path: str, error: RefusalError, *, headers: dict[str, str] | None = None) -> Response:
    """The answer to a request for `path` that is refused."""
    return plain_error(path, error.status, error.code, str(error), error.retry_after, headers)


def plain_error(
    path: str,
    status: int,
    code: str,
    message: str,
    retry_after: int | None = None,
    headers: dict[str, str] | None = None,
    param: str | None = None,
) -> Response:
    """The same from its parts. OpenAI's API has 400 where others have 422."""
    found = dict(headers or {})
    if retry_after is not None:
        found["Retry-After"] = str(retry_after)
    text = one_line(message)
    body: dict[str, Any]
    if path.startswith(OPENAI):
        status = 400 if status in (409, 422) else status
        if status in (400, 500):
            found["x-should-retry"] = "false"  # OpenAI's clients ask again after a 409 or 500 by themselves
        body = openai_error(status, code, text, param)
    elif path.startswith(A1111):
        body = {"error": _PHRASES.get(status, "Error"), "detail": text, "body": "", "errors": text}
    else:
        body = {"detail": text, "code": code}
    return JSONResponse(body, status, found)
