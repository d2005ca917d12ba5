"""ONNX Runtime's WebGPU plug-in: registered once per process, and used by one thread at a time.

The plug-in (``onnxruntime-ep-webgpu``) works with the ordinary ``onnxruntime``. Its behaviour, measured with 0.4.0:

- All sessions of a process share one device, which exists as long as one of them does. Weights of a session that is
  released are freed only with the device: what is freed while another session lives is counted as `stale`.
- Values of its own (``OrtValue`` on "webgpu") keep the device, and so everything, for good. There are none here: what
  a program is given and gives is copied for each run, a few megabytes.
- Two threads at a time end the process, even with a session each. Hence `TURN`.
"""

import contextlib
import importlib.util
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ...errors import ExecutorError
from ..worker import Stop

PROVIDER = "WebGpuExecutionProvider"
PACKAGE = "onnxruntime-ep-webgpu"
INSTALL = "pip install 'zimage-rt[webgpu]'"

_SOFTWARE = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"  # read when the plug-in is registered

OPTIONS = {
    "powerPreference": "high-performance",
    "validationMode": "basic",  # a run that uses a buffer which could not be allocated is an error
}

WIDENING = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")
"""The graph optimizations that widen all 16-bit weights to float32 when a program is loaded."""

REPACKING = "QDQSelectorActionTransformer"
"""The one that repacks int8 weights, for a product that is less exact."""


@dataclass
class Turn:
    """Which thread may use the library. May be nested."""

    _lock: Any = field(default_factory=threading.RLock, repr=False)

    @contextlib.contextmanager
    def taken(self, stop: Stop | None = None) -> Iterator[None]:
        """Waits for the turn. Raises `CancelledError` after a request to stop."""
        while not self._lock.acquire(timeout=0.1):
            if stop is not None:
                stop.check()
        try:
            yield
        finally:
            self._lock.release()


TURN = Turn()


@dataclass
class Holdings:
    """Bytes of weights on the process's device, and whose they are."""

    stale: int = 0  # of sessions that were released while others lived
    _held: dict[int, tuple[object, int]] = field(default_factory=dict, repr=False)  # by session: owner and bytes

    def add(self, session: Any, owner: object, nbytes: int) -> None:
        """Counts a session until it is gone."""
        self._held[id(session)] = (owner, nbytes)
        weakref.finalize(session, self._gone, id(session))

    def _gone(self, session: int) -> None:
        self.stale += self._held.pop(session)[1]
        if not self._held:
            self.stale = 0

    def lose(self, nbytes: int) -> None:
        """Counts what a session that failed to load may have left behind."""
        self.stale += nbytes if self._held else 0

    @property
    def any(self) -> bool:
        """Whether there is a session, and so the device."""
        return bool(self._held)

    def of_others(self, owner: object) -> int:
        """Bytes of everyone else's sessions."""
        return sum(nbytes for other, nbytes in self._held.values() if other is not owner)

    def others(self, owner: object) -> bool:
        """Whether anyone else has a session."""
        return any(other is not owner for other, _ in self._held.values())


HOLDINGS = Holdings()


def why_no_library() -> str | None:
    """Why the plug-in cannot be used; None where it can."""
    if importlib.util.find_spec("onnxruntime_ep_webgpu") is None:
        return f"{PACKAGE} is not installed; run `{INSTALL}`"
    return None


def library_version() -> str:
    """Names and versions of ONNX Runtime and of the plug-in."""
    from importlib.metadata import version

    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}, {PACKAGE} {version(PACKAGE)}"


@cache
def library_devices() -> tuple[Any, ...]:
    """What the plug-in offers: an ``OrtEpDevice`` for each GPU that ONNX Runtime sees or, without one, one for what
    Vulkan has instead. Raises `ExecutorError`."""
    if reason := why_no_library():
        raise ExecutorError(reason)
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # errors reach the caller as exceptions; stderr is the command's own
    try:
        with TURN.taken(), _software_adapters_too():
            return _offered() or _registered()
    except Exception as error:  # the library's own classes share no base but Exception
        text = " ".join(str(error).split())[:200]
        raise ExecutorError(f"{PACKAGE} cannot be loaded ({text}); run `pip install --upgrade {PACKAGE}`") from None


def _offered() -> tuple[Any, ...]:
    """What this process has registered so far, which may be someone else's doing."""
    import onnxruntime

    return tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER)


def _registered() -> tuple[Any, ...]:
    import onnxruntime
    import onnxruntime_ep_webgpu as library

    onnxruntime.register_execution_provider_library("zimage-webgpu", library.get_library_path())
    return _offered()


@contextlib.contextmanager
def _software_adapters_too() -> Iterator[None]:
    """Whether a software adapter is used is decided by `auto`, not by the plug-in."""
    before = os.environ.get(_SOFTWARE)
    os.environ[_SOFTWARE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SOFTWARE]
        else:
            os.environ[_SOFTWARE] = before


def open_session(
    model: str | bytes,
    options: Any,
    *,
    owner: object = None,
    nbytes: int = 0,
    widens: bool = False,
    strict: bool = False,
) -> Any:
    """A session on the device, for who has the turn. Its `owner` holds `nbytes` of weights with it.

    16-bit weights stay narrow unless it `widens` them when they are loaded. With `strict`, every node runs on the
    device, or this raises. Raises what the library raises, or `ExecutorError`.
    """
    import onnxruntime

    devices = library_devices()
    if not devices:
        raise ExecutorError(f"{PACKAGE} finds no GPU")
    options.add_provider_for_devices([devices[0]], OPTIONS)  # which of the GPUs that is, `OPTIONS` decides
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    disabled = [REPACKING, *(() if widens else WIDENING)]
    try:
        with _quiet():
            session = onnxruntime.InferenceSession(model, options, disabled_optimizers=disabled)
    except Exception:
        HOLDINGS.lose(nbytes)
        raise
    HOLDINGS.add(session, owner, nbytes)
    return session


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the library prints when it makes the device: a software adapter's limits are worth two warnings."""
    if HOLDINGS.any or sys.platform == "win32":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
