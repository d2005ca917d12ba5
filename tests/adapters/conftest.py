"""What the tests of LoRA at run time share. Bundles must not be written to."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sharing import made_once

from zimage_export.programs import add_programs
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.progress import Progress


@pytest.fixture(scope="session")
def extended_in(
    bundle_in: Callable[[Precision], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision], Path]:
    """The bundle of a precision, with the programs that take LoRA."""

    def find(precision: Precision) -> Path:
        def make(out: Path) -> None:
            shutil.copytree(bundle_in(precision), out)
            add_programs(Bundle.open(out), (), Progress(quiet=True), lora=True)

        return made_once(tmp_path_factory, f"extended-{precision}", make)

    return find


@pytest.fixture
def root(extended_in: Callable[[Precision], Path]) -> Path:
    """The fp32 bundle with the programs that take LoRA."""
    return extended_in(Precision.FP32)
