"""The stages of one bundle on one device: which are loaded, loading one, freeing them.

Stages take turns on the device unless all of them fit. Everything here is called on the executor's thread.

A stage's contexts are prepared before its weights are placed. They say how much scratch memory they need: where that is
more than the bundle's catalog says, the stage is planned again with it, and so are later requests.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ...bundle.bundle import Bundle
from ...errors import DeviceLostError, ExecutorError, MemoryLimitError
from ...model.programs import Program
from ...units import gib
from ..ort.host_programs import HostPrograms
from ..overheads import TENSORRT_CUDA
from ..worker import Stop
from .arena import Budget
from .block_catalog import VariantSpec
from .denoiser import Runs
from .device import Context, ContextKey, Device, Engines, OutOfDeviceMemoryError, context_key
from .loaded_stage import Capturing, DeviceTools, LoadedStage, run_of
from .plan import StagePlan, plan_stage
from .stage_sizes import ImageSizes
from .weight_source import WeightSource

Result = TypeVar("Result")

_LESS = 0.9
"""The part of its budget that is left when the device runs out of memory: others have taken some since."""

_SAVED = (Program.DENOISER, Program.DECODER)
"""After these the kernels compiled so far are stored, so that an interrupted run has not compiled for nothing."""


class StageDoesNotFitError(ExecutorError):
    """A stage that can also run on the host does not fit the device."""


@dataclass
class DeviceStages:
    """The stages that are on the device, and what they share."""

    bundle: Bundle
    device: Device
    engines: Engines
    spec: VariantSpec
    vram: int  # budget in bytes, CUDA's own needs included
    pinnable: int  # bytes of host memory that streamed blocks may hold pinned
    note: Callable[[str], object] = lambda text: None
    tools: DeviceTools = field(init=False, repr=False)
    host: HostPrograms = field(init=False, repr=False)  # for what runs on the processor
    lost: DeviceLostError | None = field(default=None, init=False, repr=False)  # nothing of the device is used then
    _stages: dict[Program, LoadedStage] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.tools = DeviceTools(
            self.device,
            self.engines,
            WeightSource(self.bundle),
            Budget(self.vram - TENSORRT_CUDA.nbytes),
            self.device.create_stream(),
            self.device.create_stream(),
            self.pinnable,
            Capturing(self.note),
        )
        self.host = HostPrograms(self.bundle, low_memory=True)

    @property
    def loaded(self) -> set[Program]:
        """The stages that are on the device now."""
        return set(self._stages)

    def run(
        self,
        program: Program,
        sizes: ImageSizes,
        runs: Runs,
        run: Callable[[LoadedStage], Result],
        *,
        keep_all: bool,
        stop: Stop,
    ) -> Result:
        """Loads a stage for an image's sizes, where it is not loaded yet, and runs it. Any error frees all stages.

        If the device has less memory than was planned with, all is planned once more with less. Raises
        `StageDoesNotFitError` where the stage may run on the host instead.
        """
        stop.check()
        if self.lost is not None:
            raise self.lost
        try:
            try:
                result = run(self._ready(program, sizes, runs, stop, keep_all=keep_all))
            except OutOfDeviceMemoryError as error:
                self._free_after_error()
                result = self._run_in_less(error, lambda: run(self._ready(program, sizes, runs, stop, keep_all=False)))
            if program in _SAVED:
                self.engines.save()
            return result
        except StageDoesNotFitError:  # what is loaded is in order
            raise
        except BaseException as error:
            self._abandon(error)
            raise

    def _run_in_less(self, error: OutOfDeviceMemoryError, again: Callable[[], Result]) -> Result:
        """Runs a stage that the device had no room for, planned with a smaller budget."""
        self.vram = int(self.vram * _LESS)
        self.tools.budget.limit = self.vram - TENSORRT_CUDA.nbytes
        self.note(f"the GPU has less memory than was free; planning again with {gib(self.vram, 2)}")
        try:
            return again()
        except MemoryLimitError:
            raise error from None

    def _ready(self, program: Program, sizes: ImageSizes, runs: Runs, stop: Stop, *, keep_all: bool) -> LoadedStage:
        plan, contexts = self._planned(program, sizes, runs)
        stage = self._stages.get(program)
        if stage is not None and stage.plan.resident != plan.resident:
            self.release(program)
            stage = None
        others = set(self._stages) - {program}
        beside = sum(self._stages[other].plan.nbytes for other in others)
        if others and not (keep_all and beside + plan.nbytes <= self.tools.budget.limit):
            self.release(*others)
        if stage is None:
            stage = self._stages[program] = LoadedStage(self.tools, self.spec, program, plan)
            stage.prepare(plan, runs(plan), contexts)
            stage.load()
        else:
            stage.prepare(plan, runs(plan), contexts)
        stage.check = stop.check
        return stage

    def _planned(
        self, program: Program, sizes: ImageSizes, runs: Runs
    ) -> tuple[StagePlan, Mapping[ContextKey, Context]]:
        """The plan of a stage with the scratch memory that its contexts need, and the contexts."""
        stage = self._stages.get(program)
        contexts = dict(stage.contexts) if stage is not None else {}
        while True:  # at each turn, more is known of another program or size
            plan = plan_stage(program, self.spec, self.bundle.manifest.config, sizes, self.vram)
            if plan is None:
                raise StageDoesNotFitError(f"{program} does not fit in the VRAM budget")
            known, keys = self.spec, set()
            for place, shapes in runs(plan):
                spec, shapes = run_of(known, plan, place, shapes)
                key = context_key(spec.name, shapes)
                if key not in contexts:
                    contexts[key] = self.engines.context(spec.name, shapes, self.tools.compute)
                keys.add(key)
                needed = contexts[key].scratch_bytes
                if needed > plan.needs.scratch:
                    self.spec = self.spec.needing(spec.name, spec.positions(shapes), needed)
            if self.spec is known:
                return plan, {key: contexts[key] for key in keys}

    def release(self, *programs: Program) -> None:
        """Frees stages; without arguments, all of them."""
        if not self._stages or (programs and not set(programs) & set(self._stages)):
            return
        try:
            self._settle()
            for program in programs or tuple(self._stages):
                stage = self._stages.pop(program, None)
                if stage is not None:
                    stage.release()
        except BaseException as error:
            self._abandon(error)
            raise

    def close(self) -> None:
        """Frees everything, the engines too. Of a device that was lost, nothing: that may wait without end."""
        if self.lost is None:
            self.release()
            for stream in (self.tools.compute, self.tools.copies):
                self.device.destroy_stream(stream)
            self.engines.close()
        self.tools.weights.close()

    def _settle(self) -> None:
        """Waits until no work is pending."""
        self.device.synchronize(self.tools.copies)
        self.device.synchronize(self.tools.compute)

    def _abandon(self, error: BaseException) -> None:
        """Frees what can be freed after an error. Errors of freeing are ignored: the caller must see the first one.

        Raises `DeviceLostError` where the error turns out to be that.
        """
        lost = error if isinstance(error, DeviceLostError) else self._free_after_error()
        if lost is not None and self.lost is None:
            self.lost = lost
            self._stages.clear()
            if lost is not error:
                raise lost from error

    def _free_after_error(self) -> DeviceLostError | None:
        try:
            self._settle()
        except DeviceLostError as lost:
            return lost
        except Exception:  # what failed may fail again, and is reported already
            pass
        for program in tuple(self._stages):
            with contextlib.suppress(Exception):
                self._stages.pop(program).release()
        return None
