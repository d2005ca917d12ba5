"""The measured process: imports a system, loads a model, generates, and reports the end of each stage.

Nothing else happens here: the runner samples memory, checks images and writes rows.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from zimage_runtime.errors import ZImageRuntimeError

from .job import Done, Failed, ImageEnd, StageEnd, WorkerEvent, WorkerJob, encode_event
from .process_memory import read_own_memory
from .schema import IMPORT, LOAD, SAVE
from .systems import System, find_system


class Channel:
    """The way back to the runner: standard output, which nothing else in the process can write to."""

    def __init__(self) -> None:
        own = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log
        self._out: TextIO = open(own, "w", encoding="utf-8")  # noqa: SIM115  # lives as long as the process

    def send(self, event: WorkerEvent) -> None:
        """Writes an event and flushes it."""
        self._out.write(encode_event(event))
        self._out.flush()

    def mark(self, stage: str, ended: float | None = None) -> None:
        """A stage ended: now, or at `ended` on time.monotonic where the system reports it only later."""
        now = time.monotonic() if ended is None else ended
        self.send(StageEnd(stage, now, read_own_memory() if ended is None else None))


def work(job: WorkerJob, channel: Channel, system: System) -> None:
    """Runs a job: imports, loads, generates all images and keeps the last."""
    system.prepare()
    channel.mark(IMPORT)
    model = system.load(job)
    channel.mark(LOAD)
    path = Path(job.picture)
    temporary = path.with_name(f".{path.name}")
    for _ in range(job.case.warmup + job.case.repeat):
        image = model.generate(channel.mark)
        image.save(temporary, "PNG")
        channel.mark(SAVE)
        channel.send(ImageEnd(hashlib.sha256(image.tobytes()).hexdigest()))
    temporary.replace(path)
    channel.send(Done(model.on_gpu(), model.gpu_allocated(), model.notes(), _versions(system.packages)))


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> None:
    """``python -m zimage_rt.bench.worker JOB``."""
    channel = Channel()
    try:
        job = WorkerJob.from_json(sys.argv[1])
        work(job, channel, find_system(job.case.system))
    except ZImageRuntimeError as error:
        channel.send(Failed(" ".join(str(error).split())))
    except MemoryError:
        channel.send(Failed("out of memory"))
    except Exception as error:  # any library's; the log has the traceback
        channel.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        raise


if __name__ == "__main__":
    main()
