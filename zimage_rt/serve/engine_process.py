"""The engine process, seen from the web process: started, spoken to, ended."""

import asyncio
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .engine import engine_main
from .orders import FromEngine, Gone, ToEngine
from .settings import EngineSettings


class EngineProcess:
    """One process. What it says is handed to `hear` on the event loop, and `Gone` as the last of it."""

    def __init__(self, settings: EngineSettings, hear: Callable[[FromEngine], None]) -> None:
        """Starts the process. To be called on the event loop's thread."""
        context = multiprocessing.get_context("spawn")  # a fork would share the web process's sockets and threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=engine_main, args=(theirs, settings), name="zimage engine", daemon=True)
        self._process.start()
        theirs.close()  # or the pipe would not close when the process ends
        self._sending = asyncio.Lock()
        loop = asyncio.get_running_loop()
        reader = threading.Thread(target=_read, args=(self._connection, self._process, loop, hear), daemon=True)
        reader.start()

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    async def say(self, message: ToEngine) -> None:
        """Sends a message, on a thread: a large one waits until the process reads it.

        Where the process is gone, nothing happens: `Gone` says so.
        """
        async with self._sending:
            await asyncio.to_thread(self._send, message)

    def _send(self, message: ToEngine) -> None:
        try:
            self._connection.send(message)
        except (OSError, ValueError):
            return

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()


def _read(
    connection: "Connection[Any, Any]",
    process: multiprocessing.process.BaseProcess,
    loop: asyncio.AbstractEventLoop,
    hear: Callable[[FromEngine], None],
) -> None:
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            break
        except Exception:  # a message that was cut off in the middle
            break
        if not _handed(loop, hear, message):
            break
    process.join(5)
    if process.exitcode is None:
        process.kill()
        process.join()
    _handed(loop, hear, Gone(process.exitcode))
    connection.close()


def _handed(loop: asyncio.AbstractEventLoop, hear: Callable[[FromEngine], None], message: FromEngine) -> bool:
    try:
        loop.call_soon_threadsafe(hear, message)
    except RuntimeError:  # the loop is closed: the server has ended
        return False
    return True
