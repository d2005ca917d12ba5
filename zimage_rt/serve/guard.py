"""Who may speak to the server: checks of Host, Origin and key, before a byte of the body is read.

A page on the web can make a visitor's browser send requests to this machine. It cannot choose their Origin header; and
a name of its own that it points to this machine (DNS rebinding) is in the Host header. An address can be nobody's trick
and is always let through, as are this machine's names.
"""

import base64
import binascii
import hmac
import ipaddress
import socket
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import A1111, OPENAI, error_response
from .metrics import Metrics
from .refusals import ForbiddenError, RefusalError, UnauthorizedError
from .settings import Settings

_OPEN = ("/images/", "/healthz", "/readyz")
"""Paths that need no key. The names of images cannot be guessed, and clients fetch them without one."""

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class Guard:
    """ASGI middleware: the outermost."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self._names = own_names() | {name.lower() for name in settings.host_names}
        self._origins = frozenset(origin.rstrip("/") for origin in settings.origins)
        self._keys = [sha256(key.encode()).digest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin")
        cors = _cors(origin) if origin in self._origins else []

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    self.metrics.refusals[message["status"]] += 1
                message["headers"] = [*message["headers"], *_HEADERS, *cors]
            await send(message)

        try:
            self._check_host(headers)
            self._check_origin(headers)
            if scope["method"] == "OPTIONS":  # never with a key: browsers ask before they send one
                await Response(status_code=204, headers={"Allow": _METHODS})(scope, receive, answer)
                return
            if not path.startswith(_OPEN):
                self._check_key(headers)
        except UnauthorizedError as error:
            await error_response(path, error, headers=_challenge(path))(scope, receive, answer)
        except RefusalError as error:
            await error_response(path, error)(scope, receive, answer)
        else:
            await self.app(scope, receive, answer)

    def _check_host(self, headers: Headers) -> None:
        name = host_name(headers.get("host", ""))
        if name is None or not (_is_address(name) or name in self._names):
            raise ForbiddenError(
                f"this server is not called {name or headers.get('host', '')!r}; --allow-host adds a name"
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return
        if origin == "null" or urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise ForbiddenError(f"pages of {origin} may not use this server; --allow-origin lets them")

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        found = False
        for given in _given_keys(headers.get("authorization", "")):
            digest = sha256(given.encode(errors="replace")).digest()
            for key in self._keys:  # all of them, so that the time says nothing
                found |= hmac.compare_digest(digest, key)
        if not found:
            raise UnauthorizedError(
                "a key is needed: send it as a bearer token, or as the password of basic authentication"
            )


_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"


def _cors(origin: str | None) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", (origin or "").encode()),
        (b"access-control-allow-methods", _METHODS.encode()),
        (b"access-control-allow-headers", b"authorization, content-type, last-event-id"),
        (b"access-control-max-age", b"600"),
        (b"vary", b"Origin"),
    ]


def _challenge(path: str) -> dict[str, str]:
    """Browsers ask for a password on the page; API clients are not to open a dialog."""
    scheme = "Bearer" if path.startswith((OPENAI, A1111)) else 'Basic realm="zimage-rt", charset="UTF-8"'
    return {"WWW-Authenticate": scheme}


def _given_keys(authorization: str) -> list[str]:
    """What a client gave as its key: a bearer token, a password, or user:password as a whole."""
    scheme, _, value = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            return [value.strip()]
        case "basic":
            try:
                text = base64.b64decode(value.strip(), validate=True).decode()
            except (binascii.Error, ValueError):
                return []
            return [text, text.partition(":")[2]]
    return []


def host_name(host: str) -> str | None:
    """The name or address in a Host header, without its port; None for one that is not valid."""
    try:
        found = urlsplit(f"//{host}")
        _ = found.port  # raises for what is no number
    except ValueError:
        return None
    if found.username is not None or found.path or found.query or found.fragment:
        return None
    return found.hostname.rstrip(".") if found.hostname else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def own_names() -> set[str]:
    """The names by which this machine is known."""
    name = socket.gethostname().lower()
    return {"localhost", name, name.partition(".")[0], f"{name.partition('.')[0]}.local"}
