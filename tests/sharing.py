"""Several worker processes of pytest-xdist at once: a processor core for each, and files that are made once for all.

Nothing here changes what a test sees. Without pytest-xdist there is one process, which uses every core.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = "PYTEST_XDIST_WORKER"  # set by pytest-xdist in its workers: gw0, gw1, …


def one_core_per_worker() -> None:
    """Binds a worker to a core of its own, as long as there are enough.

    ONNX Runtime, OpenMP and OpenBLAS start as many threads as a process has cores. In two workers they would wait for
    one another's turn, which costs a quarter of the time. To be called before one of them is loaded.
    """
    worker = os.environ.get(WORKER)
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder `name` of this run, which `make` writes to the path that it is given.

    The first worker that asks makes it while the others wait. It must not be written to afterwards.
    """
    from filelock import FileLock

    base = factory.getbasetemp()
    shared = (base.parent if WORKER in os.environ else base) / "shared"  # workers have their folders in the run's
    shared.mkdir(exist_ok=True)
    target = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not target.exists():
            part = shared / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)  # of a worker that failed
            make(part)
            part.rename(target)
    return target
