"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_PATIENCE = 30.0  # seconds that a reader may take for one event
_HEARTBEAT = 15.0  # seconds without an event, after which a comment keeps proxies from closing the connection


@dataclass(frozen=True)
class ServerEvent:
    """One event: its name, a JSON document, and a number to go on from."""

    name: str
    data: Any
    number: int | None = None

    def encode(self) -> bytes:
        """As it is sent."""
        number = "" if self.number is None else f"id: {self.number}\n"
        text = json.dumps(self.data, separators=(",", ":"))  # ASCII without newlines
        return f"{number}event: {self.name}\ndata: {text}\n\n".encode()


class EventStream(Response):
    """Sends events as they come. `events` is closed when the client leaves or reads too slowly.

    Nothing is queued for a reader: the next event is taken when the last one has left.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[ServerEvent]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Until the last event, or the client's end."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        if not sending.cancelled() and (error := sending.exception()) and not isinstance(error, TimeoutError | OSError):
            raise error

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        following: asyncio.Future[ServerEvent] | None = None
        try:
            while True:
                if following is None:
                    following = asyncio.ensure_future(_next(self._events))
                done, _ = await asyncio.wait((following,), timeout=_HEARTBEAT)
                if not done:
                    await _piece(send, b": still here\n\n")
                    continue
                try:
                    event = following.result()
                except _EndError:
                    break
                following = None
                await _piece(send, event.encode())
            await _piece(send, b"", more=False)
        finally:
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            closing = getattr(self._events, "aclose", None)
            if closing is not None:
                await closing()


async def _next(events: AsyncIterator[ServerEvent]) -> ServerEvent:
    try:
        return await anext(events)
    except StopAsyncIteration:
        raise _EndError from None


class _EndError(Exception):
    """The last event was sent. A future cannot hold `StopAsyncIteration`."""


async def _piece(send: Send, body: bytes, *, more: bool = True) -> None:
    message: Message = {"type": "http.response.body", "body": body, "more_body": more}
    async with asyncio.timeout(_PATIENCE):
        await send(message)


async def gone(receive: Receive) -> None:
    """Returns when the client has left. To be used once the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass
