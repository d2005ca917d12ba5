"""The server: a socket on the first free port, uvicorn on it, and a graceful end."""

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from zimage_runtime.errors import RequestError

from .app import make_app
from .service import Service
from .settings import Settings

_PORTS_TRIED = 100
_TAKEN = (errno.EADDRINUSE, errno.EACCES if sys.platform == "win32" else errno.EADDRINUSE)


def bind(host: str, port: int) -> socket.socket:
    """A socket on `port`, or on the next free one. Raises `RequestError` for a host that is not this machine's."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from None
    family, kind, protocol, _, address = found[0]
    for candidate in range(port, min(port + _PORTS_TRIED, 1 << 16)) if port else (0,):
        taken = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # where it would let two servers share a port
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((address[0], candidate, *address[2:]))
            taken.listen(2048)
        except OSError as error:
            taken.close()
            if error.errno not in _TAKEN:
                raise RequestError(f"--host {host} --port {candidate}: {error.strerror or error}") from None
            continue
        return taken
    raise RequestError(f"no port from {port} to {port + _PORTS_TRIED - 1} is free; choose another with --port")


def address_of(bound: socket.socket, host: str) -> str:
    """The URL of a socket."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}"


def serve(settings: Settings, bound: socket.socket, ready: Callable[[], object]) -> None:
    """Serves until a signal. `ready` is called once requests are answered.

    The first SIGINT or SIGTERM stops gracefully: what waits is returned, the job at work may finish in its time. The
    second one ends at once. Raises `BundleError`, and `UnavailableError` for an engine that cannot start.
    """
    service = Service.of(settings)
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=round(settings.grace) + 20,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config, service)

    async def run() -> None:
        await service.supervisor.start()
        ready()
        await server.serve(sockets=[bound])
        if (
            server.force_exit
        ):  # uvicorn leaves the application's end out then, which would be cancelled with a traceback
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.lifespan.shutdown(), 1)

    asyncio.run(run())
    if server.force_exit:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """Tells the service when the end begins.

    A signal that was obeyed is not raised again, so that a graceful end counts as success.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops gracefully, the second at once."""
        self.force_exit, self.should_exit = self.should_exit, True
        if self.force_exit:
            asyncio.get_running_loop().call_soon_threadsafe(self._service.supervisor.hurry)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Returns what waits, lets the job at work finish, and then closes."""
        self._service.supervisor.refuse_more()
        stopping = asyncio.ensure_future(self._service.supervisor.stop())
        await super().shutdown(sockets)
        with contextlib.suppress(Exception):
            await stopping
