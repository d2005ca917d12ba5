"""Bundles that lack an optional program are measured with what they have."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from zimage_export.measure.verify import verify
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import write_manifest
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program

pytestmark = pytest.mark.deep


def test_a_bundle_without_an_encoder_is_measured(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = Bundle.open(root).manifest
    kept = {program: records for program, records in manifest.programs.items() if program is not Program.ENCODER}
    write_manifest(root, dataclasses.replace(manifest, programs=kept))
    verified = verify(Bundle.open(root), checkpoint, Progress(quiet=True), (32, 32), prompts=("a cat",))
    assert verified.manifest.parity is not None
    assert set(verified.manifest.parity["relative_error"]) == {
        p.value for p in MODEL_PROGRAMS if p is not Program.ENCODER
    }
