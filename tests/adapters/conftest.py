"""What the tests of LoRA at run time share. Bundles must not be written to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zimage_runtime.bundle.manifest import Precision


@pytest.fixture
def root(extended_in: Callable[[Precision], Path]) -> Path:
    """The fp32 bundle with the programs that take LoRA."""
    return extended_in(Precision.FP32)
