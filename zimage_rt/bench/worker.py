"""The measured process: imports a system, loads a model, draws, and tells the runner where each stage ends.

Nothing else happens here: memory is sampled, pictures are judged and rows are written by the runner.
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

from .host_memory import read_own_memory
from .job import Done, DrawEnd, Failed, Job, StageEnd, WorkerEvent, encode_event
from .schema import IMPORT, LOAD, SAVE
from .systems import System, find_system


class Channel:
    """The way back to the runner: standard output, which nothing else in the process can reach any more."""

    def __init__(self) -> None:
        own = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print what they like: it goes to the log
        self._out: TextIO = open(own, "w", encoding="utf-8")  # noqa: SIM115  # lives as long as the process

    def send(self, event: WorkerEvent) -> None:
        """At once."""
        self._out.write(encode_event(event))
        self._out.flush()

    def mark(self, stage: str, ended: float | None = None) -> None:
        """A stage ended: now, or at a time of time.monotonic where the system tells it only later."""
        now = time.monotonic() if ended is None else ended
        self.send(StageEnd(stage, now, read_own_memory() if ended is None else None))


def work(job: Job, channel: Channel, system: System) -> None:
    """Runs a job to its end."""
    system.prepare()
    channel.mark(IMPORT)
    model = system.load(job)
    channel.mark(LOAD)
    path = Path(job.picture)
    temporary = path.with_name(f".{path.name}")
    for _ in range(job.case.warmup + job.case.repeat):
        image = model.draw(channel.mark)
        image.save(temporary, "PNG")
        channel.mark(SAVE)
        channel.send(DrawEnd(hashlib.sha256(image.tobytes()).hexdigest()))
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
        job = Job.from_json(sys.argv[1])
        work(job, channel, find_system(job.case.system))
    except ZImageRuntimeError as error:
        channel.send(Failed(" ".join(str(error).split())))
    except MemoryError:
        channel.send(Failed("out of memory"))
    except Exception as error:  # of whatever library another system is made of; the log has the traceback
        channel.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        raise


if __name__ == "__main__":
    main()
