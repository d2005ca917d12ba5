"""A word in advance where one step will take minutes on the processor: from its operations and one short product."""

from ...bundle.manifest import Manifest, Precision
from ...machine.matrix_rate import quick_rate
from ...model.operations import Operations, step_operations
from ..protocol import Work

_MINUTE = 60.0
_FASTEST_UNMEASURED = 1e11
"""Operations per second that any supported processor reaches: below a minute at this rate, nothing is measured."""


def step_seconds(operations: Operations, *, integers: bool) -> float:
    """Seconds that operations take at this processor's matrix rate; real steps reach about 80 to 100 % of it."""
    linear = quick_rate(integers)
    return operations.linear / linear + operations.other / quick_rate(False)


def slow_step_notes(manifest: Manifest, work: Work) -> tuple[str, ...]:
    """What the user should know about the time of a step: nothing if it is below a minute."""
    one, forwards = step_operations(manifest.config, work.geometry, work.tokens), work.batch * work.conditionings
    operations = Operations(forwards * one.linear, forwards * one.other)
    if operations.total < _MINUTE * _FASTEST_UNMEASURED:
        return ()
    seconds = step_seconds(operations, integers=manifest.precision is Precision.INT8)
    if seconds < _MINUTE:
        return ()
    return (f"each step is expected to take about {_duration(seconds)} on this processor",)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
