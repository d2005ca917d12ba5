"""The engine process: it owns the pipeline and runs one order after another.

Three threads: the main one runs orders, one reads the pipe so that a cancel is noticed at once, and one plans requests
beside what runs. When the pipe closes, the web process is gone, and so is this one.
"""

import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from zimage_runtime.errors import CancelledError, DeviceLostError, RequestError, ZImageRuntimeError

from .orders import Cancel, Ended, NotReady, Order, PlanOrder, Ready, Stop
from .settings import EngineSettings

if TYPE_CHECKING:
    from zimage_runtime.pipeline import Pipeline


def engine_main(connection: "Connection[Any, Any]", settings: EngineSettings) -> None:
    """The process's entry. Errors that a restart would repeat are sent as `NotReady`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the web process decides
    os.dup2(sys.stderr.fileno(), 1)  # stdout is the server's, whatever a library prints
    from zimage_runtime.pipeline import Pipeline

    mouth = Mouth(connection)
    try:
        pipeline = Pipeline.from_bundle(
            settings.bundle,
            settings.executor,
            settings.vram,
            device=settings.device,
            low_memory=settings.low_memory,
            trust_engines=settings.trust_engines,
            note=lambda text: print(text, file=sys.stderr, flush=True),
        )
        executor = pipeline.executor
        _open_more(pipeline, settings)
    except ZImageRuntimeError as error:
        mouth.say(NotReady(str(error)))
        return
    mouth.say(Ready(executor.name, executor.device_name, executor.takes_lora))
    Engine(pipeline, settings, connection, mouth).serve()


def _open_more(pipeline: "Pipeline", settings: EngineSettings) -> None:
    """Where LoRA or a ControlNet are offered, runs the programs that take them from the first image on.

    So the first request for one loads nothing again. Raises `ZImageRuntimeError` where it would be refused.
    """
    from zimage_runtime.adapters.branches import ON_CPU, check_extended
    from zimage_runtime.bundle.controlnet import ControlNet

    executor, offered = pipeline.executor, []
    if settings.takes_loras:
        offered.append(("--lora-dir", executor.takes_lora, "LoRA"))
    if settings.controlnet is not None:
        net = ControlNet.open(settings.controlnet)
        net.manifest.config.check_fits(pipeline.bundle.manifest.config.transformer, net.root)
        offered.append(("--controlnet", executor.takes_control, "ControlNet"))
    for option, takes, what in offered:
        if not takes:
            raise RequestError(f"{option}: the {executor.name} executor takes no {what}; use --executor cpu")
    if offered:
        check_extended(pipeline.bundle, ON_CPU, "--lora" if settings.takes_loras else "--control")
        executor.extend()


class Mouth:
    """The way to the web process, for all threads. Where it is gone, nothing here has a purpose."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, message: object) -> None:
        """Sends a message, or ends this process."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            os._exit(0)


class Engine:
    """Orders, one after another."""

    def __init__(
        self, pipeline: "Pipeline", settings: EngineSettings, connection: "Connection[Any, Any]", mouth: Mouth
    ) -> None:
        from .plans import Planner

        self.pipeline = pipeline
        self.settings = settings
        self.mouth = mouth
        self._connection = connection
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._planner = Planner(pipeline, mouth.say)

    def serve(self) -> None:
        """Runs orders until the pipe says stop."""
        threading.Thread(target=self._listen, name="engine pipe", daemon=True).start()
        with self.pipeline:
            while (order := self._orders.get()) is not None:
                self.mouth.say(self._run(order))
                self._cancelled.discard(order.id)

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # at once: what runs may take minutes, and nobody waits for it
            match message:
                case Order():
                    self._orders.put(message)
                case Cancel():
                    self._cancelled.add(message.id)
                    self.pipeline.cancel()  # one order is here at a time
                case PlanOrder():
                    self._planner.put(message)
                case Stop():
                    self._orders.put(None)

    def _run(self, order: Order) -> Ended:
        from .runs import Run

        try:
            Run(order, self.pipeline, self.settings.output_dir, self.mouth.say).go(lambda: order.id in self._cancelled)
        except CancelledError:
            return Ended(order.id, "cancelled", cancelled=True)
        except RequestError as error:
            return Ended(order.id, str(error), refused=True)
        except DeviceLostError as error:
            self.mouth.say(Ended(order.id, str(error)))
            os._exit(1)  # the library's clean-up may wait for a device that is gone
        except ZImageRuntimeError as error:
            return Ended(order.id, str(error))
        except MemoryError:
            self.pipeline.release()
            return Ended(order.id, "out of memory; ask for a smaller image")
        except OSError as error:
            return Ended(order.id, f"the image could not be written: {error.strerror or error}")
        return Ended(order.id)
