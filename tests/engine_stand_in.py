"""An engine's context on the stand-in device: a function over numpy arrays behind addresses, whose use is checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from device_stand_in import ALIGNMENT, MisuseError, Operation, StandInDevice
from numpy.typing import NDArray

from zimage_runtime.errors import ExecutorError


@dataclass
class StandInContext:
    """Implements `Context` with a function over numpy arrays: name → array, in and out."""

    device: StandInDevice
    program: str
    inputs: Mapping[str, tuple[np.dtype[Any], tuple[int | str, ...]]]  # type and shape, free dimensions by name
    outputs: Mapping[str, np.dtype[Any]]
    compute: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
    output_shapes: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, tuple[int, ...]]]
    scratch: Callable[[Mapping[str, tuple[int, ...]]], int]
    limits: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    capturable: bool = True
    scratch_bytes: int = 0
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def at(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The context, with its shapes set."""
        free = {n for n, (_, shape) in self.inputs.items() if any(isinstance(d, str) for d in shape)}
        if set(shapes) != free:
            raise MisuseError(f"{self.program} wants shapes of {sorted(free)}, not of {sorted(shapes)}")
        for name, shape in shapes.items():
            least, _, most = self.limits.get(name, (shape, shape, shape))
            if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                raise ExecutorError(f"{self.program} does not take {name} of shape {shape}")
        self._shapes = {
            name: shapes[name] if name in shapes else tuple(int(d) for d in shape)
            for name, (_, shape) in self.inputs.items()
        }
        self.scratch_bytes = self.scratch(self._shapes)
        return self

    def is_capturable(self, stream: int) -> bool:
        return self.capturable

    def enqueue(self, addresses: Mapping[str, int], scratch: int, scratch_bytes: int, stream: int) -> None:
        if set(addresses) != set(self.inputs) | set(self.outputs):
            odd = set(addresses) ^ (set(self.inputs) | set(self.outputs))
            raise MisuseError(f"{self.program}: addresses missing or too many: {sorted(odd)}")
        if scratch_bytes < self.scratch_bytes:
            raise MisuseError(f"{self.program} has {scratch_bytes} bytes of scratch memory")
        out_shapes = self.output_shapes(self._shapes)
        reads, writes = {}, {}
        for name, address in addresses.items():
            if address % ALIGNMENT:
                raise MisuseError(f"{self.program}: {name} is not aligned")
            if name in self.inputs:
                size = int(np.prod(self._shapes[name])) * self.inputs[name][0].itemsize
                reads[name] = (address, size)
            else:
                writes[name] = (address, int(np.prod(out_shapes[name])) * self.outputs[name].itemsize)
        for read in reads.values():
            for start, nbytes in writes.values():
                if read[0] < start + nbytes and start < read[0] + read[1]:
                    raise MisuseError(f"{self.program} would overwrite its own input")

        shapes = dict(self._shapes)

        def run() -> None:
            arrays = {
                name: self.device.view(*read).view(self.inputs[name][0]).reshape(shapes[name]).copy()
                for name, read in reads.items()
            }
            for name, values in self.compute(arrays).items():
                start, nbytes = writes[name]
                if values.shape != tuple(out_shapes[name]):
                    raise MisuseError(f"{self.program}: {name} is {values.shape}, expected {out_shapes[name]}")
                self.device.view(start, nbytes)[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

        work = [*writes.values()] + ([(scratch, scratch_bytes)] if scratch_bytes else [])
        self.device.enqueue(Operation(self.program, list(reads.values()), work, run), stream)
