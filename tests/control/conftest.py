"""What the tests of ControlNets share. Folders must not be written to."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from control_tools import VERSIONS, Version, export, write_control
from sharing import made_once

from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.pipeline import Pipeline

Nets = Callable[..., Path]


@pytest.fixture
def root(extended_in: Callable[[Precision], Path]) -> Path:
    """The fp32 bundle with those programs."""
    return extended_in(Precision.FP32)


@pytest.fixture(scope="session")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Version], Path]:
    """The published file of a version."""

    def find(version: Version) -> Path:
        def make(out: Path) -> None:
            out.mkdir()
            write_control(out / f"{version.name}.safetensors", version)

        return made_once(tmp_path_factory, f"control-file-{version.name}", make) / f"{version.name}.safetensors"

    return find


@pytest.fixture(scope="session")
def net_of(file_of: Callable[[Version], Path], tmp_path_factory: pytest.TempPathFactory) -> Nets:
    """The folder of a version, in a precision."""

    def find(version: Version, precision: Precision = Precision.FP32) -> Path:
        make = partial(export, file_of(version), version=version, precision=precision)
        return made_once(tmp_path_factory, f"control-{version.name}-{precision}", make)

    return find


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def version(request: pytest.FixtureRequest) -> Version:
    """Each published version."""
    found: Version = request.param
    return found


@pytest.fixture
def pipeline(root: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(root, "cpu") as opened:
        yield opened
