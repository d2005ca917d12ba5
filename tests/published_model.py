"""The published model's manifest, sized by its own graphs; no weight exists."""

import tempfile
from functools import cache
from pathlib import Path

from zimage_export.synthetic.outline import write_outline
from zimage_runtime.bundle.manifest import Manifest, Precision


@cache
def published(precision: Precision) -> Manifest:
    """With the programs of every executor."""
    with tempfile.TemporaryDirectory() as folder:
        return write_outline(Path(folder) / "bundle", precision).manifest
