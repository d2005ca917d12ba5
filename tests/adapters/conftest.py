"""What the tests of LoRA at run time share. Bundles must not be written to."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zimage_export.programs import add_programs
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.progress import Progress


@pytest.fixture(scope="session")
def extended_in(
    bundle_in: Callable[[Precision], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision], Path]:
    """The bundle of a precision, with the programs that take LoRA."""
    made: dict[Precision, Path] = {}

    def find(precision: Precision) -> Path:
        if precision not in made:
            root = tmp_path_factory.mktemp("extended") / precision
            shutil.copytree(bundle_in(precision), root)
            add_programs(Bundle.open(root), (), Progress(quiet=True), lora=True)
            made[precision] = root
        return made[precision]

    return find
