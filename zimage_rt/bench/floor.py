"""The least time that each stage can take here: its operations at the matrix rate that was measured."""

from dataclasses import dataclass

from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.geometry import ImageGeometry

from .operations import Operations, decode_operations, step_operations, text_operations
from .schema import Case, Floor, Reading, absent

_INTEGER_LINEAR = ("int8",)  # precisions whose linear layers are products of integers


@dataclass(frozen=True)
class Rates:
    """Operations a second of this device, or why they are unknown."""

    floats: Reading
    integers: Reading


NOT_MEASURED = "the matrix rate of this executor is not measured by this version"


def cpu_rates() -> Rates:
    """Measured now; takes a second or a few."""
    from zimage_runtime.machine.matrix_rate import float_rate, integer_rate

    return Rates(Reading(float_rate()), Reading(integer_rate()))


def unknown_rates(reason: str = NOT_MEASURED) -> Rates:
    """For devices other than the CPU."""
    return Rates(absent(reason), absent(reason))


def floor_of(
    case: Case, config: ModelConfig, geometry: ImageGeometry, tokens: int, rates: Rates, median_step: float | None
) -> Floor:
    """A case's floor. `tokens` are the prompt's; `median_step` is in seconds, None where steps are not shown."""
    integers = case.precision in _INTEGER_LINEAR

    def seconds(operations: Operations) -> Reading:
        linear = rates.integers if integers else rates.floats
        if rates.floats.value is None or linear.value is None:
            return absent(rates.floats.reason or linear.reason or NOT_MEASURED)
        return Reading(operations.linear / linear.value + operations.other / rates.floats.value)

    step = seconds(step_operations(config, geometry, tokens))
    if step.value is None:
        fraction = step
    elif median_step is None:
        fraction = absent("the system does not show its steps")
    else:
        fraction = Reading(step.value / median_step)
    return Floor(
        float_rate=rates.floats,
        integer_rate=rates.integers,
        text=seconds(text_operations(config, tokens)),
        step=step,
        decode=seconds(decode_operations(config, geometry)),
        step_fraction=fraction,
    )
