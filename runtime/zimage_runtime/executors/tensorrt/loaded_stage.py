"""A stage while it is on the device: its weights, its buffers, and running its blocks.

Weights stay when only the image's size changes; buffers, scratch memory and what is captured are then made anew.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...arrays import FloatArray
from ...bundle.tensors import DType, to_float32
from ...model.blocks import NORMS, BlockPlace
from ...model.programs import Program
from .arena import Arena, Budget
from .block_catalog import VariantSpec
from .device import Context, Device, Engines, Graph, Pinned, Stream
from .plan import StagePlan
from .stage_sizes import block_layout, is_modulated
from .weight_source import WeightSource
from .weight_stream import BlockStack

_FLOAT = 4  # bytes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Machine:
    """What all stages share."""

    device: Device
    engines: Engines
    spec: VariantSpec
    weights: WeightSource
    budget: Budget
    compute: Stream
    copies: Stream
    pinnable: int  # bytes of host memory that streamed blocks may hold pinned


@dataclass
class LoadedStage:
    """One stage. `prepare`, then `run` its blocks; all of it is queued on the compute stream."""

    machine: Machine
    program: Program
    plan: StagePlan
    _weights: Arena = field(init=False)
    _work: Arena = field(init=False)
    _stack: BlockStack = field(init=False)
    _ends: dict[str, int] = field(default_factory=dict)
    _contexts: dict[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]], Context] = field(default_factory=dict)
    _scratch: tuple[int, int] = (0, 0)
    _buffers: dict[str, int] = field(default_factory=dict)
    _pinned: dict[str, Pinned] = field(default_factory=dict)
    graphs: dict[object, Graph] = field(default_factory=dict)  # captured steps, by what they read and its shapes
    warm: set[object] = field(default_factory=set)  # which of these steps ran since the buffers were made
    owners: dict[int, object] = field(default_factory=dict)  # whose values the buffers of each conditioning hold
    _runs: list[list[tuple[BlockPlace, Shapes]]] = field(default_factory=list)  # that are prepared
    check: Callable[[], object] = lambda: None  # called before each block is queued; raises to stop

    def __post_init__(self) -> None:
        self._weights = Arena(self.machine.device, self.machine.budget)
        self._work = Arena(self.machine.device, self.machine.budget)

    def load(self) -> None:
        """Uploads the weights. May be called once."""
        machine, needs = self.machine, self.plan.needs
        streamed = sum(needs.block_bytes[index] for index in self.plan.streamed)
        self._stack = BlockStack(
            machine.device,
            self._weights,
            self.plan,
            lambda index, target: self._fill(needs.blocks[index], target),
            machine.compute,
            machine.copies,
            wraps=self.program is Program.DENOISER,
            pin_streamed=self.program is Program.DENOISER and 0 < streamed <= machine.pinnable,
        )
        for place, nbytes in zip(needs.ends, needs.end_bytes, strict=True):
            self._ends[place.key] = self._weights.allocate(nbytes)
            staging = self._weights.pinned(nbytes)
            self._fill(place, staging.data[:nbytes])
            machine.device.upload(self._ends[place.key], staging.address, nbytes, machine.copies)
            machine.device.synchronize(machine.copies)
            self._weights.release_pinned(staging)
        self._stack.load()

    def _fill(self, place: BlockPlace, target: NDArray[np.uint8]) -> None:
        spec = self.machine.spec
        program = spec.program_of(place)
        self.machine.weights.fill(target, place, program, spec.blocks[place.key], block_layout(program, place))

    def prepare(self, plan: StagePlan, runs: list[tuple[BlockPlace, Shapes]]) -> None:
        """Makes the buffers for an image's size, and the contexts for all shapes that its blocks will run at.

        The last runs' contexts stay while the plan does: a prompt and a negative prompt take turns. Nothing of the
        stage may be under way.
        """
        same = bool(self._buffers) and plan == self.plan
        if same and self._prepared(runs):
            return
        kept = [*(self._runs[-1:] if same else []), runs]
        self.forget()
        self.plan, self._runs = plan, kept
        needed = 0
        for place, shapes in itertools.chain(*kept):
            key = self._key(place, shapes)
            if key not in self._contexts:
                self._contexts[key] = self.machine.engines.context(key[0])
                needed = max(needed, self._contexts[key].set_shapes(shapes))
        self._scratch = (self._work.allocate(needed), needed)
        buffers = dict(plan.needs.buffers)
        for image in range(plan.images):
            buffers |= {f"{name}.{image}": size for name, size in plan.needs.image_buffers.items()}
        self._buffers = {name: self._work.allocate(size) for name, size in buffers.items()}

    def _prepared(self, runs: list[tuple[BlockPlace, Shapes]]) -> bool:
        return all(self._key(place, shapes) in self._contexts for place, shapes in runs)

    def _key(self, place: BlockPlace, shapes: Shapes) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]:
        return self.machine.spec.program_of(place).name, tuple(sorted(shapes.items()))

    def keep_graph(self, key: object, graph: Graph) -> None:
        """What was captured is valid for as long as the buffers are."""
        self._work.keep_graph(graph)
        self.graphs[key] = graph

    def forget(self) -> None:
        """Gives back what depends on the image's size."""
        self._contexts.clear()
        self._buffers, self._pinned, self._runs = {}, {}, []
        self.graphs, self.warm, self.owners = {}, set(), {}
        self._work.release()

    def release(self) -> None:
        """Gives everything back. Nothing of the stage may be under way."""
        try:
            self.forget()
        finally:
            self._weights.release()

    def buffer(self, name: str, offset: int = 0) -> int:
        """The address of a buffer."""
        return self._buffers[name] + offset

    def host(self, name: str, nbytes: int) -> Pinned:
        """Pinned memory by name, for what goes to or comes from the device."""
        if name not in self._pinned or len(self._pinned[name].data) < nbytes:
            self._pinned[name] = self._work.pinned(nbytes)
        return self._pinned[name]

    def staged(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """Float32 values where `upload` takes them from, to be written. The last copy of this name must be done."""
        nbytes = _FLOAT * math.prod(shape)
        return self.host(name, nbytes).data[:nbytes].view(np.float32).reshape(shape)

    def write(self, name: str, values: FloatArray) -> None:
        """Puts float32 values there."""
        self.staged(name, values.shape)[...] = values

    def upload(self, name: str, nbytes: int, address: int) -> None:
        """Queues a copy of what was written to the device."""
        self.machine.device.upload(address, self._pinned[name].address, nbytes, self.machine.compute)

    def send(self, name: str, values: FloatArray, address: int) -> None:
        """Writes values to pinned memory and queues their copy to the device."""
        self.write(name, values)
        self.upload(name, values.nbytes, address)

    def send_block(self, place: BlockPlace, name: str) -> None:
        """Puts a block's weights into a buffer, for `enqueue`. The last copy of this name must be done."""
        nbytes = block_layout(self.machine.spec.program_of(place), place).nbytes
        self._fill(place, self.host(name, nbytes).data[:nbytes])
        self.upload(name, nbytes, self.buffer(name))

    def receive(
        self, name: str, shape: tuple[int, ...], address: int, dtype: DType = DType.F32
    ) -> Callable[[], FloatArray]:
        """Queues a copy to the host; what it returns gives the values, once the stream is synchronized."""
        nbytes = dtype.size * math.prod(shape)
        pinned = self.host(name, nbytes)
        self.machine.device.download(pinned.address, address, nbytes, self.machine.compute)
        return lambda: to_float32(pinned.data[:nbytes].view(dtype.storage).reshape(shape), dtype).copy()

    def synchronize(self) -> None:
        """Waits for all that is queued on the compute stream."""
        self.machine.device.synchronize(self.machine.compute)

    def begin(self) -> None:
        """A pass through the blocks begins."""
        self._stack.begin()

    def block(self, index: int, runs: list[tuple[Mapping[str, int], Shapes]], rows: int = 0, row: int = 0) -> None:
        """Queues one block for each of `runs`: addresses of its inputs and outputs, and its free shapes.

        `rows` is the address of its four norms' rows, `row` bytes apart, where the timestep decides them.
        """
        self.check()
        place = self.plan.needs.blocks[index]
        base = self._stack.acquire(index)
        norms = {f"{name}.weight": rows + turn * row for turn, name in enumerate(NORMS)} if is_modulated(place) else {}
        for addresses, shapes in runs:
            self.enqueue(place, base, {**addresses, **norms}, shapes)
        self._stack.release(index)

    def end(self, place: BlockPlace, addresses: Mapping[str, int], shapes: Shapes) -> None:
        """Queues one of the blocks that are always resident."""
        self.enqueue(place, self._ends[place.key], addresses, shapes)

    def enqueue(self, place: BlockPlace, base: int, addresses: Mapping[str, int], shapes: Shapes) -> None:
        """Queues a block whose weights are at `base`."""
        program = self.machine.spec.program_of(place)
        offsets = block_layout(program, place).offsets
        weights = {name: base + offset for name, offset in offsets.items()}
        context = self._contexts[self._key(place, shapes)]
        context.enqueue({**weights, **addresses}, *self._scratch, self.machine.compute)
