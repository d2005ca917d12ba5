"""A batch on Ray: the same groups, on an actor pool of pipelines. Images are written where they are made.

What is done is filtered before the dataset is made, and looked for again by each worker, so that neither a worker nor
the driver that dies loses or repeats an image. Ray's usage statistics and dashboard are off.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from zimage_runtime.errors import RequestError, ZImageRuntimeError

from .fields import RowRequest
from .generate import Failure, ImageGenerator, Outcome
from .items import Item, Shape, groups
from .records import Record, is_done, read_record
from .store import ATTEMPTS, open_store

_OBJECT_STORE = 128 << 20
"""Bytes, of a cluster that is started here: rows and records pass through it, never images."""

_TURNS = 4
"""Groups for each worker, so that none waits long for the last one."""

_ATTEMPTS = 2
"""Of a row alone, after a worker died of its group. A worker may also die of something else."""

_PATIENCE = 20.0
"""Seconds in which a cluster must answer."""

SILENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
"""The environment of the driver and of each worker."""


class RayError(ZImageRuntimeError):
    """Ray could not run the batch."""


@dataclass(frozen=True)
class WorkerOptions:
    """How each worker opens its pipeline, and where it writes. `bundle` is opened on its own node."""

    bundle: str | None  # a directory on each node, or a name on the Hub; None for the demo bundle
    executor: str
    output: str
    metadata: bool = True
    vram: int | None = None
    low_memory: bool = False
    trust_engines: bool = False


@dataclass(frozen=True)
class Pool:
    """How many workers, and what Ray reserves for each."""

    workers: int
    cpus: int
    gpus: int

    @property
    def kind(self) -> str:
        """What each worker computes on, in words."""
        return "GPU" if self.gpus else "CPU" + "s" * (self.cpus > 1)


class Worker:
    """One pipeline, in a process of its own. Ray Data calls it with batches of groups."""

    def __init__(self, options: WorkerOptions, cpus: int) -> None:
        """Opens the pipeline; nothing large is loaded."""
        from zimage_runtime.pipeline import Pipeline

        from ..demo import demo_bundle

        os.environ["OMP_NUM_THREADS"] = str(max(cpus, 1))  # which all of ours heed
        pipeline = Pipeline.from_bundle(
            demo_bundle() if options.bundle is None else options.bundle,
            options.executor,
            options.vram,
            low_memory=options.low_memory,
            trust_engines=options.trust_engines,
        )
        self._store = open_store(options.output)
        self._generator = ImageGenerator(pipeline, self._store, options.metadata)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Generates groups, which are JSON in the column `group`; the column `outcome` has what came of each row."""
        outcomes: list[str] = []
        for text in batch["group"]:
            try:
                outcomes += [_outcome_text(one) for one in self.generate(group_items(str(text)))]
            except OSError as error:  # nothing more can be written
                outcomes.append(json.dumps({"stop": [error.errno, error.strerror or str(error), error.filename]}))
        return {"outcome": outcomes}

    def generate(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Generates a group, but for what a worker that died has made of it.

        After such a death rows are generated one by one, so that it is known which of them a worker dies of.
        """
        left = []
        for item in items:
            record = read_record(self._store, item.key)
            if record is not None and is_done(self._store, record):
                yield record
            else:
                left.append(item)
        group = f"group-{items[0].key}"
        if not self._attempts(group):
            self._begin(group)
            yield from self._outcomes(left)
        else:
            for item in left:
                if self._attempts(item.key) >= _ATTEMPTS:
                    yield Failure(item.key, f"{_ATTEMPTS} workers died of it")
                else:
                    self._begin(item.key)
                    yield from self._outcomes([item])
                self._store.remove(f"{ATTEMPTS}/{item.key}")
        self._store.remove(f"{ATTEMPTS}/{group}")

    def _outcomes(self, items: Sequence[Item]) -> Iterator[Outcome]:
        return (one for one in self._generator.run(items) if isinstance(one, Record | Failure))

    def _attempts(self, name: str) -> int:
        """How often something was begun and not ended."""
        return len(self._store.read(f"{ATTEMPTS}/{name}") or b"")

    def _begin(self, name: str) -> None:
        self._store.write(f"{ATTEMPTS}/{name}", b"." * (self._attempts(name) + 1))


@dataclass(frozen=True)
class Cluster:
    """Ray, from when the block begins until it ends. Meanwhile `sys.stdout` is stderr: Ray says there what it must."""

    address: str  # empty: what RAY_ADDRESS says, or else a cluster of this machine alone, which is started
    _redirected: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False, compare=False)

    def __enter__(self) -> "Cluster":
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        os.environ.update(SILENT)
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # stderr is the command's own
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default, all other processes go first
        if address == "local" and "RAY_AUTH_MODE" not in os.environ:  # as by default, but with no token in ~/.ray
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        try:
            import ray
            import ray.data
        except ImportError:
            raise RequestError("--ray needs Ray; install it with: pip install 'zimage-rt[ray]'") from None
        _check_address(address)
        new: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with _without_stderr():  # on which the level of its log is said
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": SILENT},
                    **(new if address == "local" else {}),
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise RayError(f"Ray cannot be used at {address}: {text[:300]}") from None
        finally:
            with contextlib.suppress(ValueError):  # which only the main thread may set, and only it loses
                signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process without clean-up
        self._redirected.enter_context(contextlib.redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()
        self._redirected.close()

    def pool(self, workers: int | None, cpus: int | None) -> Pool:
        """The workers: of so many CPUs each where that is given, otherwise one per GPU or, where there is none, one per
        node with all of its CPUs. Raises `RequestError` where the cluster cannot hold one."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if cpus is None and gpus:
            return Pool(workers or gpus, 1, 1)
        each = cpus or min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=1)
        fit = sum(int(node.get("CPU", 0)) // each for node in nodes)
        if not fit:
            raise RequestError(f"no node of the cluster has {each} CPUs; give fewer with --cpus-per-worker")
        return Pool(min(workers or fit, fit), each, 0)


def on_ray(items: Sequence[Item], options: WorkerOptions, pool: Pool) -> Iterator[Outcome]:
    """Generates items on a pool of workers. Raises `OSError` where a worker cannot write, and `RayError`."""
    import ray
    from ray.exceptions import RayError as Failed

    most = max(min(64, math.ceil(len(items) / (pool.workers * _TURNS))), 1)
    texts = [group_text(group) for group in groups(items, most)]
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is shown by the caller
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.actor_task_retry_on_errors = False
    workers = min(pool.workers, len(texts))
    dataset = ray.data.from_items([{"group": text} for text in texts], override_num_blocks=len(texts)).map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(options, pool.cpus),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    try:
        for row in dataset.iter_rows():
            yield outcome_of(row["outcome"])
    except Failed as error:
        raise RayError(f"Ray ended the batch: {_cause(error)}") from None


def _check_address(address: str) -> None:
    """Raises `RayError` where nothing listens, which Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", "local", or something that Ray itself knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise RayError(f"Ray cannot be used at {address}: {error}") from None


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Sends what native code writes to stderr to nowhere while the block runs."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _outcome_text(outcome: Outcome) -> str:
    return json.dumps({("record" if isinstance(outcome, Record) else "failure"): asdict(outcome)})


def outcome_of(text: str) -> Outcome:
    """What came of a row, as a worker says it. Raises `OSError` where the worker cannot write."""
    document = json.loads(text)
    if "stop" in document:
        raise OSError(*document["stop"])
    return Record(**document["record"]) if "record" in document else Failure(**document["failure"])


def group_text(items: Sequence[Item]) -> str:
    """A group as JSON, for another process."""
    return json.dumps([asdict(item) for item in items])


def group_items(text: str) -> list[Item]:
    """The group of a text."""
    found = []
    for values in json.loads(text):
        shape = values["shape"]
        values["shape"] = Shape(**{**shape, "loras": tuple(tuple(one) for one in shape["loras"])})
        values["request"] = RowRequest(**values["request"])
        values["prompts"] = tuple(values["prompts"])
        found.append(Item(**values))
    return found


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while isinstance(inner := error.__cause__ or getattr(error, "cause", None), BaseException):
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
