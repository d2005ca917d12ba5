"""What the runner passes to a worker, and what the worker reports: one line of JSON each."""

import json
from dataclasses import dataclass
from typing import Any, Self

from zimage_runtime.checked_json import from_document, to_document

from .process_memory import HostMemory
from .schema import Case


@dataclass(frozen=True)
class WorkerJob:
    """A case and where things are on this machine. Only the worker sees the paths."""

    case: Case
    model: str  # the bundle, or a baseline's checkpoint
    picture: str  # where the last image is written, PNG

    def to_json(self) -> str:
        """The job as JSON, for the worker's command line."""
        return json.dumps(to_document(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The job that `to_json` wrote. Raises `DocumentError` for anything else."""
        return from_document(cls, json.loads(text), "job")


@dataclass(frozen=True)
class StageEnd:
    """A stage ended."""

    stage: str
    time: float  # of time.monotonic, which all processes of the machine share
    host: HostMemory | None


@dataclass(frozen=True)
class ImageEnd:
    """An image is written."""

    digest: str  # of its pixels


@dataclass(frozen=True)
class Done:
    """All images are generated."""

    on_gpu: bool | None  # None where the system does not report what it ran on
    gpu_allocated: int | None  # the peak of the system's own allocator
    notes: tuple[str, ...]
    versions: dict[str, str]  # of the system's packages


@dataclass(frozen=True)
class Failed:
    """The system failed, for a reason that is known."""

    reason: str


WorkerEvent = StageEnd | ImageEnd | Done | Failed
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (StageEnd, ImageEnd, Done, Failed)}


def encode_event(event: WorkerEvent) -> str:
    """The event as one line."""
    return json.dumps({"event": type(event).__name__, **to_document(event)}) + "\n"


def decode_event(line: str) -> WorkerEvent:
    """The event that `encode_event` wrote. Raises `ConfigError` or `ValueError` for anything else."""
    data = json.loads(line)
    kind = _KINDS.get(str(data.pop("event", None))) if isinstance(data, dict) else None
    if kind is None:
        raise ValueError("not an event of a worker")
    event: WorkerEvent = from_document(kind, data, "event")
    return event
