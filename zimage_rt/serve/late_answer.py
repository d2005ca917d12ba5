"""JSON that takes minutes: headers before the answer, so that no client or proxy gives up.

Node's `fetch` waits 300 seconds for headers, many proxies 60 between two bytes. So an answer that is not ready after a
while begins with spaces, which JSON allows. Its status is then 200 whatever comes; an error is in the body, in the
form of the API.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .answers import error_response
from .refusals import ClientGoneError, RefusalError

WAITS = 45.0
"""Seconds after which headers are sent."""

BEATS = 15.0
"""Seconds between two spaces."""


async def json_answer(path: str, making: Awaitable[dict[str, Any]]) -> Response:
    """The answer that `making` gives, or fails with. A client that leaves is for `making` to notice."""
    task = asyncio.ensure_future(making)
    try:
        done, _ = await asyncio.wait((task,), timeout=WAITS)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return JSONResponse(task.result()) if done else _LateAnswer(path, task)


class _LateAnswer(Response):
    """Spaces until the answer is there."""

    media_type = "application/json"

    def __init__(self, path: str, task: "asyncio.Future[dict[str, Any]]") -> None:
        super().__init__()
        del self.headers["content-length"]
        self._path = path
        self._task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not self._task.done():
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                await asyncio.wait((self._task,), timeout=BEATS)
            body = _encoded(self._path, self._task.result)
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            self._task.cancel()


def _encoded(path: str, result: Callable[[], dict[str, Any]]) -> bytes:
    try:
        return json.dumps(result(), separators=(",", ":")).encode()
    except RefusalError as error:
        return bytes(error_response(path, error).body)
    except ClientGoneError:
        return b""
