"""Bounds on bodies, while they are read: their length, the time they take, and what all of them take together."""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import error_response
from .limits import Limits
from .refusals import SlowBodyError, TooLargeError, UnavailableError

_PATIENCE = 30.0  # seconds between two pieces of a body


class BodyRefusedError(HTTPException):
    """Raised where the application reads a body; one of Starlette's own, which its parsers let through."""


class Bodies:
    """ASGI middleware. What is too long is refused at once where the client states a length."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self._reading = 0  # bytes of all bodies that are being read or worked on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts what the application reads."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "0")
        if stated.isascii() and stated.isdigit() and int(stated[:20]) > self.limits.max_body:
            await error_response(scope["path"], self._too_large())(scope, receive, send)
            return
        read, complete = 0, False

        async def counted() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()  # which waits for the client to leave
            try:
                async with asyncio.timeout(_PATIENCE):
                    message = await receive()
            except TimeoutError:
                raise _raised(SlowBodyError("the body did not arrive in time")) from None
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                read += size
                self._reading += size
                complete = not message.get("more_body", False)
                if read > self.limits.max_body:
                    raise _raised(self._too_large())
                if self._reading > self.limits.max_bodies:
                    raise _raised(UnavailableError("too many large requests at once", retry_after=5))
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self._reading -= read

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is longer than the {self.limits.max_body} bytes that this server reads")


def _raised(error: TooLargeError | SlowBodyError | UnavailableError) -> BodyRefusedError:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return BodyRefusedError(error.status, str(error), headers)
