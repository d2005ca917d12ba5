"""What is known of a finished image, from the moment before it appears until the manifest has it.

An image's record is written first and counts only together with the file that it describes, so that an interruption
between the two loses nothing and repeats nothing but a decoding.
"""

import io
import json
import zipfile
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from zimage_runtime.arrays import FloatArray
from zimage_runtime.errors import ZImageRuntimeError
from zimage_runtime.images.metadata import ImageInfo

from .store import LATENTS, RECORDS, Store


@dataclass(frozen=True)
class Record:
    """A finished image, as the manifest has it."""

    id: str
    request: str  # the row, as JSON
    seed: int
    file: str
    size: int  # bytes
    sha256: str
    seconds: float  # that its stages took, wherever they ran
    executor: str
    key: str  # of its content: see `items`

    def to_json(self) -> bytes:
        """As a file holds it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_values(cls, values: Any) -> Self | None:
        """The record of a JSON object or a manifest's row; None for anything else."""
        if not isinstance(values, dict):
            return None
        found: dict[str, Any] = {one.name: values.get(one.name) for one in fields(cls)}
        if not all(isinstance(found[one.name], one.type) for one in fields(cls)):  # type: ignore[arg-type]
            return None
        return cls(**found)


def write_record(store: Store, record: Record) -> None:
    """Notes an image that is about to appear."""
    store.write(f"{RECORDS}/{record.key}.json", record.to_json())


def read_record(store: Store, key: str) -> Record | None:
    """The record of a key; None where there is none, or what is there was cut off."""
    data = store.read(f"{RECORDS}/{key}.json")
    if data is None:
        return None
    try:
        return Record.from_values(json.loads(data))
    except ValueError:
        return None


def is_done(store: Store, record: Record | None) -> bool:
    """Whether a record's image is there."""
    return record is not None and store.holds(record.file, record.size, record.sha256)


def recorded_keys(store: Store) -> set[str]:
    """The keys of all records."""
    return {name.removesuffix(".json") for name in store.names(RECORDS)}


def remove_records(store: Store, keys: Iterable[str]) -> None:
    """Forgets records that the manifest has."""
    for key in keys:
        store.remove(f"{RECORDS}/{key}.json")


@dataclass(frozen=True)
class Latents:
    """An image that needs no more than decoding."""

    values: FloatArray  # [channels, height / 8, width / 8]
    info: ImageInfo  # what made them
    seconds: float  # that it took


def spool(store: Store, key: str, latents: Latents) -> None:
    """Keeps latents until their image is written: 1 MB for 1024x1024."""
    buffer = io.BytesIO()
    facts = json.dumps({"info": latents.info.replay(), "seconds": latents.seconds})
    np.savez(buffer, values=latents.values, facts=np.frombuffer(facts.encode(), np.uint8))
    store.write(f"{LATENTS}/{key}.npz", buffer.getvalue())


def spooled(store: Store, key: str) -> Latents | None:
    """Latents that were kept; None where there are none, or what is there is damaged."""
    data = store.read(f"{LATENTS}/{key}.npz")
    if data is None:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            values = np.asarray(file["values"], np.float32)
        return Latents(values, ImageInfo.from_replay(facts["info"], key), float(facts["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, ZImageRuntimeError):
        return None


def keep_latents(store: Store, keys: Collection[str]) -> None:
    """Forgets all latents but those of some keys."""
    for name in store.names(LATENTS):
        if name.removesuffix(".npz") not in keys:
            store.remove(f"{LATENTS}/{name}")


def remove_latents(store: Store, key: str) -> None:
    """Forgets latents whose image is there."""
    store.remove(f"{LATENTS}/{key}.npz")
