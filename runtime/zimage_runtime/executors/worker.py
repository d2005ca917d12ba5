"""A thread that an executor's native calls run on, so that signals and cancelling reach a caller who waits for them.

Python calls a signal handler on the main thread only, and only between two of its own instructions: never while that
thread is inside a library's call that takes minutes. So the call runs here, and the caller waits in short naps.
"""

import contextlib
import os
import queue
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import CancelledError, ExecutorError

T = TypeVar("T")

_NAP = 0.1  # seconds; on Windows, a wait without end is not interrupted by Ctrl-C


class Stop:
    """A request to stop, from any thread, that a running call notices at its next operator."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested = False
        self._abort: Callable[[], object] | None = None

    @property
    def requested(self) -> bool:
        """Whether anyone asked to stop."""
        return self._requested

    def request(self) -> None:
        """Stops what runs now, and all that would run after it."""
        with self._lock:
            self._requested = True
            if self._abort is not None:
                self._abort()

    def check(self) -> None:
        """Raises `CancelledError` once a stop was requested: for loops of short calls."""
        if self._requested:
            raise CancelledError

    @contextlib.contextmanager
    def aborting(self, abort: Callable[[], object]) -> Iterator[None]:
        """While the block runs, a request to stop calls `abort`, which ends the library's call in the block."""
        with self._lock:
            if self._requested:
                raise CancelledError
            self._abort = abort
        try:
            yield
        finally:
            with self._lock:
                self._abort = None


class _Task:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # which the caller raises
            forget_locals(error)
            self.error = error
        finally:
            self.function = lambda: None  # or a result would keep what it was made from
            self.done.set()


def forget_locals(error: BaseException | None) -> None:
    """Empties the frames that an error went through: code that keeps the error would keep what was loaded there."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Worker:
    """Runs functions one after another on one thread, which starts when first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = 0  # the id of the process that the thread is in
        self._starting = threading.Lock()
        weakref.finalize(self, self._tasks.put, None)  # an executor that nobody closes does not leave its thread

    def call(self, function: Callable[[], T], stop: Stop | None = None) -> T:
        """The result of `function`, run on the thread. Calls from the thread itself run at once.

        Whatever interrupts the wait, such as a signal handler that raises, requests `stop`, waits until the function
        has ended, and goes on: nothing is freed under a running call.

        Raises `CancelledError` if `stop` was requested before, and `ExecutorError` in a process that was forked after
        the thread started: neither this thread nor the library's own exist there, and waiting would never end.
        """
        if stop is not None:
            stop.check()
        if threading.current_thread() is self._thread or sys.is_finalizing():
            return function()  # while the process ends, no other thread runs
        self._start()
        task = _Task(function)
        try:
            self._tasks.put(task)
            self._wait(task)
        except BaseException:
            if stop is not None:
                stop.request()
            self._wait(task)
            raise
        if task.error is not None:
            raise task.error
        result: T = task.result
        return result

    def close(self) -> None:
        """Ends the thread once its calls are done."""
        with self._starting:
            if self._thread is not None:
                self._tasks.put(None)
                if threading.current_thread() is not self._thread:
                    self._thread.join()
                self._thread = None

    def _wait(self, task: _Task) -> None:
        while not task.done.wait(_NAP):
            # The garbage collector finalizes this worker, which ends its thread, before it closes a generator that
            # still has something to free.
            ended = self._thread is None or not self._thread.is_alive()
            if ended and not task.done.is_set():
                task.run()

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None and self._process != os.getpid():
                raise ExecutorError(
                    "this pipeline ran before the process was forked and cannot run in the fork; open a pipeline in "
                    "each process, or start processes with multiprocessing's spawn method"
                )
            if self._thread is None:
                self._process = os.getpid()
                self._thread = threading.Thread(target=_work, args=(self._tasks,), name=self._name, daemon=True)
                self._thread.start()


def _work(tasks: "queue.SimpleQueue[_Task | None]") -> None:
    while (task := tasks.get()) is not None:
        task.run()
        del task  # its result may be large, and the next task may be long in coming
