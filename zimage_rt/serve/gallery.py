"""The folder of finished images. Each file is complete from the moment that it has its name, and says how it was made.

A name begins with the time, so that the order of names is that of time, and ends with 128 random bits, so that nobody
guesses it. Only files with such names are listed, served or removed, whatever else lies in the folder.
"""

import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runtime.errors import RequestError
from zimage_runtime.images.formats import ImageFormat
from zimage_runtime.images.metadata import ImageInfo

from .settings import Keep

_SUFFIXES = {ImageFormat.PNG: "png", ImageFormat.JPEG: "jpg", ImageFormat.WEBP: "webp"}
_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
_NAME = re.compile(r"zimage-(\d{13})-(\d{3})-[0-9a-f]{32}\.(png|jpg|webp)")
_PART = re.compile(r"\.zimage-\d{13}-.*\.part")
_DAY = 24 * 60 * 60
_ABANDONED = 60  # seconds after which nobody still writes a file: another server may use the folder


def new_name(now: float, index: int, secret: str, kind: ImageFormat) -> str:
    """A file's name: `now` in seconds since the epoch, the image's `index` in its request, and 32 hex digits."""
    return f"zimage-{round(now * 1000):013d}-{index:03d}-{secret}.{_SUFFIXES[kind]}"


def media_type(name: str) -> str:
    """Of a file of the gallery."""
    return _TYPES[name.rpartition(".")[2]]


def settings_of(info: ImageInfo) -> dict[str, Any]:
    """How an image was made; what a job can ask for has the name of its field."""
    return {
        "prompt": info.prompt,
        "negative_prompt": info.negative,
        "width": info.width,
        "height": info.height,
        "steps": info.steps,
        "cfg_scale": info.cfg_scale,
        "sampler": info.sampler.value,
        "scheduler": info.scheduler.value,
        "shift": info.shift,
        "seed": info.seed,
        "strength": info.strength,
        "variation_seed": info.variation_seed,
        "variation_strength": info.variation_strength,
        "loras": [{"name": one.name, "weight": one.weight} for one in info.loras],
        "control": None if info.controlnet is None else _control(info),
        "from_image": info.image is not None,
        "masked": info.mask is not None,
        "model": info.model,
        "executor": info.executor,
    }


def _control(info: ImageInfo) -> dict[str, Any]:
    return {
        "name": info.controlnet,
        "type": info.control_type,
        "scale": info.control_scale,
        "start": info.control_start,
        "end": info.control_end,
    }


@dataclass(frozen=True)
class Picture:
    """An image of the gallery."""

    name: str
    created: float  # seconds since the epoch
    settings: dict[str, Any] | None  # None for a file whose metadata cannot be read

    def document(self) -> dict[str, Any]:
        """As the API lists it."""
        size = self.settings or {}
        return {
            "name": self.name,
            "url": f"/images/{self.name}",
            "width": size.get("width"),
            "height": size.get("height"),
            "created": self.created,
            "settings": self.settings,
        }


class Gallery:
    """A folder. Every method touches the disk and belongs on a thread."""

    def __init__(self, folder: Path, keep: Keep) -> None:
        self.folder = folder
        self.keep = keep
        oldest = time.time() - _ABANDONED
        for left in folder.iterdir():  # by an engine that was killed while it wrote
            if _PART.fullmatch(left.name) and left.stat().st_mtime < oldest:
                left.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """All images, newest first."""
        return sorted((path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)

    def path(self, name: str) -> Path | None:
        """The file of a name; None where there is none."""
        if not _NAME.fullmatch(name):
            return None
        path = self.folder / name
        return path if path.is_file() and not path.is_symlink() else None

    def read(self, name: str) -> bytes | None:
        """The bytes of an image; None where there is none."""
        path = self.path(name)
        try:
            return None if path is None else path.read_bytes()
        except FileNotFoundError:
            return None

    def listed(self, before: str | None, limit: int) -> tuple[list[Picture], bool]:
        """Images older than the one named `before`, newest first, and whether there are more."""
        names = [name for name in self.names() if before is None or name < before]
        return [self._picture(name) for name in names[:limit]], len(names) > limit

    def _picture(self, name: str) -> Picture:
        from zimage_runtime.images.image_files import read_image_info

        try:
            settings: dict[str, Any] | None = settings_of(read_image_info(self.folder / name))
        except RequestError:
            settings = None
        return Picture(name, _created(name), settings)

    def remove(self, name: str) -> bool:
        """Removes an image. False where there is none."""
        path = self.path(name)
        if path is None:
            return False
        path.unlink(missing_ok=True)
        return True

    def prune(self, pinned: Collection[str] = ()) -> int:
        """Removes what need not stay, except what is pinned, and returns how many that were."""
        names = self.names()
        gone = set() if self.keep.count is None else set(names[self.keep.count :])
        if self.keep.days is not None:
            oldest = time.time() - self.keep.days * _DAY
            gone |= {name for name in names if _created(name) < oldest}
        gone -= set(pinned)
        for name in gone:
            (self.folder / name).unlink(missing_ok=True)
        return len(gone)


def _created(name: str) -> float:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]) / 1000
