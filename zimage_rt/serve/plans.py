"""Plans of requests that may come, made beside what runs.

The planner has a pipeline of its own on the engine's executor. Where `auto` chose that executor, the real request may
go to another one when it does not fit; the planner never changes what is open.
"""

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from zimage_runtime.errors import ZImageRuntimeError

from .orders import FromEngine, Planned, PlanOrder
from .pictures import sources

if TYPE_CHECKING:
    from zimage_runtime.pipeline import Pipeline


class Planner:
    """Answers `PlanOrder`s on a thread of its own."""

    def __init__(self, pipeline: "Pipeline", say: Callable[[FromEngine], object]) -> None:
        self._engines = pipeline
        self._own: Pipeline | None = None
        self._say = say
        self._orders: queue.SimpleQueue[PlanOrder] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="engine planner", daemon=True).start()

    def put(self, order: PlanOrder) -> None:
        """Asks for a plan."""
        self._orders.put(order)

    def _work(self) -> None:
        while True:
            self._say(self._planned(self._orders.get()))

    def _pipeline(self) -> "Pipeline":
        from zimage_runtime.pipeline import Pipeline

        executor = self._engines.executor
        if self._own is None or self._own.choice.current is not executor:
            self._own = Pipeline.on(self._engines.bundle, executor)
        return self._own

    def _planned(self, order: PlanOrder) -> Planned:
        wanted = order.wanted
        try:
            job = self._pipeline().prepare(wanted.request(*sources(wanted)))
        except ZImageRuntimeError as error:
            return Planned(order.id, False, str(error), None, ())
        except Exception as error:  # the planner goes on, whatever a request brings up
            return Planned(order.id, False, f"cannot be planned: {error or type(error).__name__}", None, ())
        notes = "; ".join(notice.text for notice in job.notices)
        return Planned(order.id, True, notes, job.plan.document(), tuple(job.plan.lines()))
