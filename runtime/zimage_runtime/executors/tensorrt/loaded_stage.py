"""A stage while it is on the device: its weights, its buffers, and running its blocks.

If only the size of the image changes, the weights stay, and buffers, scratch memory and the captured graph are renewed.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...adapters.branches import Branches
from ...arrays import FloatArray
from ...bundle.tensors import DType, to_float32
from ...model.blocks import NORMS, BlockPlace
from ...model.programs import Program
from . import weight_stream
from .arena import Arena, Budget
from .block_catalog import ProgramSpec, VariantSpec
from .device import Context, ContextKey, Device, Engines, Graph, Pinned, Shapes, Stream, context_key
from .lora_matrices import fill_branches
from .plan import StagePlan
from .stage_sizes import block_layout, branch_layout, is_modulated
from .weight_source import WeightSource
from .weight_stream import WeightStream

_FLOAT = 4  # bytes


@dataclass
class Capturing:
    """Whether steps are captured as CUDA graphs, which saves launches: nothing that an image should fail for."""

    note: Callable[[str], object] = lambda text: None
    possible: bool = True

    def give_up(self, reason: str) -> None:
        """Steps are queued kernel by kernel from now on."""
        self.possible = False
        self.note(f"steps run without a CUDA graph, a little slower ({reason})")


@dataclass(frozen=True)
class DeviceTools:
    """What all stages of a bundle share on one device."""

    device: Device
    engines: Engines
    weights: WeightSource
    budget: Budget
    compute: Stream
    copies: Stream
    pinnable: int  # bytes of host memory that streamed blocks may hold pinned
    capturing: Capturing = field(default_factory=Capturing)


@dataclass
class LoadedStage:
    """One stage. `prepare` and `load` it, then queue its blocks. Everything runs on the compute stream."""

    tools: DeviceTools
    spec: VariantSpec
    program: Program
    plan: StagePlan
    _weights: Arena = field(init=False)
    _work: Arena = field(init=False)
    _blocks: WeightStream = field(init=False)
    _ends: dict[str, int] = field(default_factory=dict)
    contexts: dict[ContextKey, Context] = field(default_factory=dict)  # of all that is prepared
    _scratch: tuple[int, int] = (0, 0)
    _buffers: dict[str, int] = field(default_factory=dict)
    _pinned: dict[str, Pinned] = field(default_factory=dict)
    graphs: dict[object, Graph] = field(default_factory=dict)  # captured steps, by what they read and its shapes
    warm: set[object] = field(default_factory=set)  # which of these steps ran since the buffers were allocated
    owners: dict[int, object] = field(default_factory=dict)  # whose values the buffers of each conditioning hold
    lora: Branches | None = None  # whose matrices are in the buffer for them
    _branches: dict[str, dict[str, int]] = field(default_factory=dict)  # their addresses by block and input
    _runs: list[list[tuple[BlockPlace, Shapes]]] = field(default_factory=list)  # that are prepared
    check: Callable[[], object] = lambda: None  # called before each block is queued; raises to stop

    def __post_init__(self) -> None:
        self._weights = Arena(self.tools.device, self.tools.budget)
        self._work = Arena(self.tools.device, self.tools.budget)

    def load(self) -> None:
        """Uploads the weights. May be called once."""
        tools, needs = self.tools, self.plan.needs
        self._blocks = WeightStream(
            tools.device,
            self._weights,
            self.plan,
            lambda index, target: self._fill(needs.blocks[index], target),
            tools.compute,
            tools.copies,
            wraps=self.program is Program.DENOISER,
            pinnable=tools.pinnable if self.program is Program.DENOISER else 0,
        )
        for place, nbytes in zip(needs.ends, needs.end_bytes, strict=True):
            self._ends[place.key] = self._weights.allocate(nbytes)
            self._upload_end(place, nbytes)
        self._blocks.load()

    def _upload_end(self, place: BlockPlace, nbytes: int) -> None:
        """Uploads the weights of a block that is always resident, of tens of megabytes, in pieces."""
        device, copies = self.tools.device, self.tools.copies
        values = np.empty(nbytes, np.uint8)
        self._fill(place, values)
        staging = self._weights.pinned(min(nbytes, weight_stream.PIECE))
        for start in range(0, nbytes, weight_stream.PIECE):
            piece = values[start : start + weight_stream.PIECE]
            staging.data[: len(piece)] = piece
            device.upload(self._ends[place.key] + start, staging.address, len(piece), copies)
            device.synchronize(copies)
        self._weights.release_pinned(staging)

    def _fill(self, place: BlockPlace, target: NDArray[np.uint8]) -> None:
        program = self.spec.program_of(place)
        self.tools.weights.fill(target, place, program, self.spec.blocks[place.key], block_layout(program, place))

    def prepare(
        self, plan: StagePlan, runs: list[tuple[BlockPlace, Shapes]], contexts: Mapping[ContextKey, Context]
    ) -> None:
        """Allocates the buffers for an image's size, and takes over the contexts of all that its blocks will run.

        The last runs' contexts stay while the plan does: a prompt and a negative prompt take turns. No work of
        the stage may be pending.
        """
        same = bool(self._buffers) and plan == self.plan
        if same and all(key in self.contexts for key in contexts):
            return
        kept = [*(self._runs[-1:] if same else []), runs]
        known = {**self.contexts, **contexts}
        self.forget()
        self.plan, self._runs = plan, kept
        keys = [self._key(place, shapes) for place, shapes in itertools.chain(*kept)]
        self.contexts = {key: known[key] for key in keys}
        # the plan has what these contexts need, and those of the same plan that came before
        scratch = max(plan.needs.scratch, *(context.scratch_bytes for context in self.contexts.values()))
        self._scratch = (self._work.allocate(scratch), scratch)
        buffers = dict(plan.needs.buffers)
        for image in range(plan.images):
            buffers |= {f"{name}.{image}": size for name, size in plan.needs.image_buffers.items()}
        self._buffers = {name: self._work.allocate(size) for name, size in buffers.items()}

    def _key(self, place: BlockPlace, shapes: Shapes) -> ContextKey:
        program, shapes = run_of(self.spec, self.plan, place, shapes)
        return context_key(program.name, shapes)

    def fill_branches(self, branches: Branches | None) -> None:
        """Uploads LoRA's matrices, unless they are there: of all blocks, filled up to the plan's rank with zeros.

        No work of the stage may be pending.
        """
        needs = self.plan.needs
        if not needs.rank or branches is None or self.lora is branches:
            return
        self.lora, address = None, self.buffer("lora")
        for place in (*needs.blocks, *needs.ends):
            program = self.spec.program_of(place, lora=True)
            layout = branch_layout(program, needs.rank)
            staging = self.host("lora", layout.nbytes).data[: layout.nbytes]
            fill_branches(staging, branches, place, program, layout, needs.rank)
            self.upload("lora", layout.nbytes, address)
            self.synchronize()
            self._branches[place.key] = {name: address + offset for name, offset in layout.offsets.items()}
            address += layout.nbytes
        self.lora = branches

    @property
    def is_capturable(self) -> bool:
        """Whether the library says that all that was prepared may be captured."""
        return all(context.is_capturable(self.tools.compute) for context in self.contexts.values())

    def keep_graph(self, key: object, graph: Graph) -> None:
        """Keeps a captured graph for as long as the buffers that it uses."""
        self._work.keep_graph(graph)
        self.graphs[key] = graph

    def forget(self) -> None:
        """Frees what depends on the size of the image."""
        self.contexts.clear()
        self._buffers, self._pinned, self._runs = {}, {}, []
        self.graphs, self.warm, self.owners = {}, set(), {}
        self.lora, self._branches = None, {}
        self._work.release()

    def release(self) -> None:
        """Frees everything. No work of the stage may be pending."""
        try:
            self.forget()
        finally:
            self._weights.release()

    def buffer(self, name: str, offset: int = 0) -> int:
        """The address of a buffer."""
        return self._buffers[name] + offset

    def host(self, name: str, nbytes: int) -> Pinned:
        """Pinned memory by name, of at least `nbytes`, for copies to and from the device."""
        if name not in self._pinned or len(self._pinned[name].data) < nbytes:
            self._pinned[name] = self._work.pinned(nbytes)
        return self._pinned[name]

    def staged(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """Float32 values to be written, from where `upload` copies them. The last copy of this name must be done."""
        nbytes = _FLOAT * math.prod(shape)
        return self.host(name, nbytes).data[:nbytes].view(np.float32).reshape(shape)

    def write(self, name: str, values: FloatArray) -> None:
        """Writes float32 values to pinned memory, from where `upload` copies them."""
        self.staged(name, values.shape)[...] = values

    def upload(self, name: str, nbytes: int, address: int) -> None:
        """Queues a copy to the device of what was written under a name."""
        self.tools.device.upload(address, self._pinned[name].address, nbytes, self.tools.compute)

    def send(self, name: str, values: FloatArray, address: int) -> None:
        """Writes values to pinned memory and queues their copy to the device."""
        self.write(name, values)
        self.upload(name, values.nbytes, address)

    def send_block(self, place: BlockPlace, name: str) -> None:
        """Queues a copy of a block's weights to a buffer, for `enqueue`. The last copy of this name must be done."""
        nbytes = block_layout(self.spec.program_of(place), place).nbytes
        self._fill(place, self.host(name, nbytes).data[:nbytes])
        self.upload(name, nbytes, self.buffer(name))

    def receive(
        self, name: str, shape: tuple[int, ...], address: int, dtype: DType = DType.F32
    ) -> Callable[[], FloatArray]:
        """Queues a copy to the host. Call the result for the values, once the stream is synchronized."""
        nbytes = dtype.size * math.prod(shape)
        pinned = self.host(name, nbytes)
        self.tools.device.download(pinned.address, address, nbytes, self.tools.compute)
        return lambda: to_float32(pinned.data[:nbytes].view(dtype.storage).reshape(shape), dtype).copy()

    def synchronize(self) -> None:
        """Waits for all that is queued on the compute stream."""
        self.tools.device.synchronize(self.tools.compute)

    def begin(self) -> None:
        """Begins a pass through the blocks."""
        self._blocks.begin()

    def block(self, index: int, runs: list[tuple[Mapping[str, int], Shapes]], rows: int = 0, row: int = 0) -> None:
        """Queues one block for each of `runs`: addresses of its inputs and outputs, and its free shapes.

        `rows` is the address of its four norms' rows, `row` bytes apart, if the norms depend on the timestep.
        """
        self.check()
        place = self.plan.needs.blocks[index]
        base = self._blocks.acquire(index)
        norms = {f"{name}.weight": rows + turn * row for turn, name in enumerate(NORMS)} if is_modulated(place) else {}
        for addresses, shapes in runs:
            self.enqueue(place, base, {**addresses, **norms}, shapes)
        self._blocks.release(index)

    def end(self, place: BlockPlace, addresses: Mapping[str, int], shapes: Shapes) -> None:
        """Queues one of the blocks that are always resident."""
        self.enqueue(place, self._ends[place.key], addresses, shapes)

    def enqueue(self, place: BlockPlace, base: int, addresses: Mapping[str, int], shapes: Shapes) -> None:
        """Queues a block whose weights are at `base`."""
        program = self.spec.program_of(place)
        offsets = block_layout(program, place).offsets
        weights = {name: base + offset for name, offset in offsets.items()}
        context = self.contexts[self._key(place, shapes)]
        branches = self._branches.get(place.key, {})
        context.enqueue({**weights, **addresses, **branches}, *self._scratch, self.tools.compute)


def run_of(spec: VariantSpec, plan: StagePlan, place: BlockPlace, shapes: Shapes) -> tuple[ProgramSpec, Shapes]:
    """The program that a block of a stage runs, and the shapes of all its inputs with free dimensions."""
    rank = plan.needs.rank
    program = spec.program_of(place, lora=bool(rank))
    return program, {**shapes, **program.branch_shapes(rank)}
