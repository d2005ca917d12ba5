"""The checkpoint that bundles were made from: baselines generate from it, and so does the float32 reference."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.programs import COMPONENTS


@dataclass(frozen=True)
class Original:
    """A checkpoint in diffusers layout, found and checked."""

    root: Path
    name: str  # what results call it: the last part of its name on the Hub, or its folder
    config: ModelConfig
    fingerprint: str
    float32_bytes: int  # memory that its weights need in float32


def open_checkpoint(model: str | Path, progress: Progress) -> Original:
    """Opens what `zimage-export build` calls MODEL: a directory, a name on the Hub, or ``tiny``.

    Reads configurations and headers, no weights. Raises `HubError` for a model that cannot be fetched, and
    `CheckpointError` for a bad one.
    """
    from zimage_export.source.checkpoint import Checkpoint
    from zimage_export.source.model import find_model

    found = find_model(model, progress)
    checkpoint = Checkpoint.open(found.path)
    shapes = [shape for part in COMPONENTS for shape in checkpoint.weights(part).shapes().values()]
    return Original(
        root=checkpoint.root,
        name=found.name.partition("/")[2] if found.name else checkpoint.name,
        config=checkpoint.config,
        fingerprint=_fingerprint(checkpoint.root),
        float32_bytes=sum(4 * math.prod(shape) for shape in shapes),
    )


def _fingerprint(root: Path) -> str:
    """Of names, sizes and times: hashing 33 GB would take minutes."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    listed = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
