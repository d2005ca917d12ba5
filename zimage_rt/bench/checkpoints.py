"""The checkpoint that bundles were made from: baselines generate from it, and so does the float32 reference."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.programs import COMPONENTS

_STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}


@dataclass(frozen=True)
class Original:
    """A checkpoint in diffusers layout, found and checked."""

    root: Path
    name: str  # what results call it: the last part of its name on the Hub, its folder, or the transformer's file
    config: ModelConfig
    fingerprint: str
    float32_bytes: int  # memory that its weights need in float32


def open_checkpoint(model: str | Path, progress: Progress, folder: Path) -> Original:
    """Opens what `zimage-export build` calls MODEL: a directory, a name on the Hub, one file with everything, a ComfyUI
    ``models`` folder, or ``tiny``.

    Reads configurations and headers. Only what is not in diffusers layout, which other systems do not read, is written
    to `folder` in that layout, once: what is quantized in float32, the rest as it is stored. Raises `HubError` for a
    model that cannot be fetched, and `CheckpointError` for a bad one.
    """
    from zimage_export.source.checkpoint import Checkpoint
    from zimage_export.source.model import find_model

    found = find_model(model, progress)
    checkpoint = Checkpoint.open(found.path, found.files)
    single = [path for part in COMPONENTS if (path := found.files.get(part)) is not None]
    files = single or [path for path in checkpoint.root.rglob("*") if path.is_file()]
    fingerprint = _fingerprint(files, None if single else checkpoint.root)
    shapes = [shape for part in COMPONENTS for shape in checkpoint.weights(part).shapes().values()]
    return Original(
        root=_in_layout(checkpoint, folder, fingerprint, progress) if single else checkpoint.root,
        name=found.name.partition("/")[2] if found.name else checkpoint.name,
        config=checkpoint.config,
        fingerprint=fingerprint,
        float32_bytes=sum(4 * math.prod(shape) for shape in shapes),
    )


def _fingerprint(files: Iterable[Path], root: Path | None) -> str:
    """Of names, sizes and times: hashing 33 GB would take minutes."""
    named = sorted((path, str(path.relative_to(root)) if root else path.name) for path in files)
    listed = [(name, path.stat().st_size, path.stat().st_mtime_ns) for path, name in named]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _in_layout(checkpoint: Any, folder: Path, fingerprint: str, progress: Progress) -> Path:
    """The opened checkpoint in diffusers layout: written, unless it was written before from the same files."""
    from zimage_export.output import check_disk, replaced_directory
    from zimage_export.storage.stored import total_bytes
    from zimage_export.synthetic.published_layout import write_configs, write_tokenizer_config
    from zimage_export.weights.streaming import converted, write_weights

    mark = folder / "made_from"
    if mark.exists() and mark.read_text() == fingerprint:
        return folder
    tensors = {}
    for part in COMPONENTS:
        weights = checkpoint.weights(part)
        sources = {name: weights.get(name) for name in weights.names()}
        prefix = "model." if part == "text_encoder" else ""  # as published
        tensors[part] = [
            converted(source.renamed(prefix + name), DType.F32 if source.quantized else source.dtype)
            for name, source in sources.items()
        ]
    total = sum(total_bytes(group) for group in tensors.values())
    check_disk(folder, total)
    with (
        replaced_directory(folder) as made,
        progress.task("checkpoint in diffusers layout", total, in_bytes=True) as advance,
    ):
        write_configs(made, checkpoint.config)
        for part, group in tensors.items():
            write_weights(made / part / f"{_STEMS[part]}.safetensors", group, advance)
        (made / "tokenizer").mkdir()
        (made / "tokenizer" / "tokenizer.json").write_bytes(checkpoint.tokenizer.read_bytes())
        write_tokenizer_config(made / "tokenizer")
        (made / mark.name).write_text(fingerprint)
    return folder
