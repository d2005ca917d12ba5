"""Steps under control on a device: values that stay there, hints in the type of the provider's programs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import FloatArray
from ...model.programs import Program, is_hint
from .device import Provider


@dataclass(frozen=True)
class DeviceRunner:
    """Runs a session's programs for steps under control. Implements `ControlRunner`."""

    provider: Provider
    dim: int
    run: Callable[[Program, Mapping[str, Any], Mapping[str, Any]], None]  # on values of the device, into such values
    run_on_host: Callable[[Program, dict[str, FloatArray]], dict[str, FloatArray]]

    def upload(self, values: FloatArray) -> Any:
        return self.provider.device.upload(values)

    def no_hint(self) -> Any:
        shape = (1, 1, self.dim)
        if self.provider.halves_hints:
            return self.provider.device.zero_halves(shape)
        return self.provider.device.wrapped(np.zeros(shape, np.float32))

    def run_host(self, program: Program, feeds: dict[str, FloatArray]) -> dict[str, FloatArray]:
        return self.run_on_host(program, feeds)

    def run_step(
        self, program: Program, inputs: Mapping[str, Any], outputs: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        device, halves = self.provider.device, self.provider.halves_hints
        made = {
            name: device.empty_halves(shape) if halves and is_hint(name) else device.empty(shape)
            for name, shape in outputs.items()
        }
        self.run(program, inputs, made)
        return made
