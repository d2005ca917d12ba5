"""The stages of one bundle on one device: which are loaded, loading one, freeing them.

Stages take turns on the device unless all of them fit. Everything here is called on the executor's thread.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ...bundle.bundle import Bundle
from ...errors import ExecutorError
from ...model.programs import Program
from ..ort.host_programs import HostPrograms
from ..overheads import TENSORRT_CUDA
from ..worker import Stop
from .arena import Budget
from .block_catalog import VariantSpec
from .denoiser import Runs
from .device import Device, Engines
from .loaded_stage import DeviceTools, LoadedStage
from .plan import plan_stage
from .stage_sizes import ImageSizes
from .weight_source import WeightSource

Result = TypeVar("Result")


@dataclass
class DeviceStages:
    """The stages that are on the device, and what they share."""

    bundle: Bundle
    device: Device
    engines: Engines
    spec: VariantSpec
    vram: int  # budget in bytes, CUDA's own needs included
    pinnable: int  # bytes of host memory that streamed blocks may hold pinned
    tools: DeviceTools = field(init=False, repr=False)
    host: HostPrograms = field(init=False, repr=False)  # for what runs on the processor
    _stages: dict[Program, LoadedStage] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.tools = DeviceTools(
            self.device,
            self.engines,
            self.spec,
            WeightSource(self.bundle),
            Budget(self.vram - TENSORRT_CUDA.nbytes),
            self.device.create_stream(),
            self.device.create_stream(),
            self.pinnable,
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
        """Loads a stage for an image's sizes, where it is not loaded yet, and runs it. Any error frees all stages."""
        stop.check()
        plan = plan_stage(program, self.spec, self.bundle.manifest.config, sizes, self.vram)
        if plan is None:
            raise ExecutorError(f"{program} does not fit in the VRAM budget")  # callers plan first and do not get here
        try:
            stage = self._stages.get(program)
            if stage is not None and stage.plan.resident != plan.resident:
                self.release(program)
                stage = None
            others = set(self._stages) - {program}
            if others and not keep_all:
                self.release(*others)
            if stage is None:
                stage = self._stages[program] = LoadedStage(self.tools, program, plan)
                stage.prepare(plan, runs(plan.needs.blocks))
                stage.load()
            else:
                stage.prepare(plan, runs(plan.needs.blocks))
            stage.check = stop.check
            return run(stage)
        except BaseException:
            self._abandon()
            raise

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
        except BaseException:
            self._abandon()
            raise

    def close(self) -> None:
        """Frees everything, the engines too."""
        self.release()
        for stream in (self.tools.compute, self.tools.copies):
            self.device.destroy_stream(stream)
        self.tools.weights.close()
        self.engines.close()

    def _settle(self) -> None:
        """Waits until no work is pending."""
        self.device.synchronize(self.tools.copies)
        self.device.synchronize(self.tools.compute)

    def _abandon(self) -> None:
        """Frees what can be freed after an error. Errors of freeing are ignored: the caller must see the first one."""
        for free in (self._settle, *(self._stages.pop(program).release for program in tuple(self._stages))):
            with contextlib.suppress(Exception):
                free()
