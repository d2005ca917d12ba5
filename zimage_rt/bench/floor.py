"""The least time that each stage can take here: its operations at the measured matrix rate of its device."""

from dataclasses import dataclass

from zimage_runtime.bundle.manifest import CPU
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.geometry import ImageGeometry
from zimage_runtime.model.operations import Operations, decode_operations, step_operations, text_operations

from .schema import OURS, Case, Floor, Reading, absent

_INTEGER_LINEAR = ("int8",)  # precisions whose linear layers are products of integers


@dataclass(frozen=True)
class Rates:
    """Operations per second of a device, or why they are unknown."""

    floats: Reading
    integers: Reading


NO_GPU_RATE = "this version does not measure a GPU's matrix rate"
NO_DEVICE = "unknown whether this ran on the CPU or on a GPU"


def why_no_rate(case: Case, on_gpu: bool | None) -> str | None:
    """Why a case has no matrix rate; None where the processor's is its own.

    `on_gpu` is what the process reported: None where it failed first, or where its system does not know.
    """
    if case.system == OURS:
        on_gpu = case.executor != CPU
    if on_gpu is None:
        return NO_DEVICE
    return NO_GPU_RATE if on_gpu else None


def cpu_rates() -> Rates:
    """The processor's, measured now; takes a second or a few."""
    from zimage_runtime.machine.matrix_rate import float_rate, integer_rate

    return Rates(Reading(float_rate()), Reading(integer_rate()))


def unknown_rates(reason: str) -> Rates:
    """No rates, and why."""
    return Rates(absent(reason), absent(reason))


def floor_of(
    case: Case, config: ModelConfig, geometry: ImageGeometry, tokens: int, rates: Rates, median_step: float | None
) -> Floor:
    """A case's floor. `tokens` are the prompt's; `median_step` is in seconds, None where steps are not timed."""
    integers = case.precision in _INTEGER_LINEAR

    def seconds(operations: Operations) -> Reading:
        linear = rates.integers if integers else rates.floats
        if rates.floats.value is None:
            return rates.floats
        if linear.value is None:
            return linear
        return Reading(operations.linear / linear.value + operations.other / rates.floats.value)

    step = seconds(step_operations(config, geometry, tokens))
    if step.value is None:
        fraction = step
    elif median_step is None:
        fraction = absent("the system does not report its steps")
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
