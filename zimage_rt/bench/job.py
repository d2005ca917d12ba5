"""What the runner hands to a worker, and what comes back: a line of JSON each."""

import json
from dataclasses import dataclass
from typing import Any, Self

from .documents import from_document, to_document
from .process_memory import HostMemory
from .schema import Case


@dataclass(frozen=True)
class Job:
    """A case and where things are on this machine. Only the worker sees the paths."""

    case: Case
    model: str  # the bundle, or a baseline's checkpoint
    picture: str  # where the picture is written, PNG

    def to_json(self) -> str:
        """For the worker's command line."""
        return json.dumps(to_document(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        return from_document(cls, json.loads(text), "job")


@dataclass(frozen=True)
class StageEnd:
    """A stage ended."""

    stage: str
    time: float  # of time.monotonic, which all processes of the machine share
    host: HostMemory | None


@dataclass(frozen=True)
class DrawEnd:
    """A picture is written."""

    digest: str  # of its pixels


@dataclass(frozen=True)
class Done:
    """All pictures are drawn."""

    gpu_allocated: int | None  # the most that the system's own allocator held
    notes: tuple[str, ...]
    versions: dict[str, str]  # of what the system is made of


@dataclass(frozen=True)
class Failed:
    """The system gave up, for a reason that it told."""

    reason: str


Event = StageEnd | DrawEnd | Done | Failed
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (StageEnd, DrawEnd, Done, Failed)}


def encode_event(event: Event) -> str:
    """One line."""
    return json.dumps({"event": type(event).__name__, **to_document(event)}) + "\n"


def decode_event(line: str) -> Event:
    """What `encode_event` wrote. Raises `DocumentError` or `ValueError` for anything else."""
    data = json.loads(line)
    kind = _KINDS.get(str(data.pop("event", None))) if isinstance(data, dict) else None
    if kind is None:
        raise ValueError("no event of a worker")
    event: Event = from_document(kind, data, "event")
    return event
