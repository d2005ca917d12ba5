"""The `tensorrt` executor: block engines on an NVIDIA GPU, weights resident or streamed within a VRAM budget."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import cast

from ...adapters.branches import check_extended
from ...bundle.bundle import Bundle
from ...bundle.manifest import CPU, TENSORRT
from ...model.programs import Program
from ...tiles.tiling import tiled_bytes
from ..ort.cpu_plan import check_host
from ..protocol import Computation, Plan, Work
from ..turns import scope
from ..worker import Worker
from .block_catalog import VariantSpec
from .decoder_tiles import TILES_ON_HOST
from .device import Device, Engines
from .device_stages import DeviceStages
from .plan import ResidencyPlan, plan_residency
from .session import TensorRtSession


@dataclass
class TensorRtExecutor:
    """Runs a bundle's stages on one device. `kind.open_executor` makes one for a GPU. Implements `Executor`."""

    bundle: Bundle
    device: Device
    engines: Engines
    spec: VariantSpec
    vram: int  # budget in bytes, CUDA's own needs included
    pinnable: int = 0  # bytes of host memory that streamed blocks may hold pinned
    keep_loaded: bool = True
    library: str = "tensorrt"  # name and version
    note: Callable[[str], object] = lambda text: None
    stages: DeviceStages = field(init=False, repr=False)
    _worker: Worker = field(init=False, repr=False)
    _closed: bool = field(default=False, repr=False)

    name = TENSORRT
    takes_lora = True  # as further inputs of the same engines
    takes_control = False

    def __post_init__(self) -> None:
        self.stages = DeviceStages(
            self.bundle, self.device, self.engines, self.spec, self.vram, self.pinnable, self.note
        )
        self._worker = Worker("zimage tensorrt")

    @property
    def device_name(self) -> str:
        major, minor = self.device.capability
        return f"{self.device.name} (compute capability {major}.{minor})"

    @property
    def peak_bytes(self) -> int:
        """The most device memory that was allocated so far, without what CUDA itself needs."""
        return self.stages.tools.budget.peak

    @property
    def loaded(self) -> set[Program]:
        """The stages that are on the device now."""
        return self.stages.loaded

    def extend(self) -> None:
        """Nothing: each plan says which form of the block programs runs."""

    def plan(self, work: Work) -> ResidencyPlan:
        config = self.bundle.manifest.config
        if work.branches is not None:
            check_extended(self.bundle, {Program.MODULATION: CPU})
        # with what the contexts of earlier requests have shown
        plan = plan_residency(self.stages.spec, self.bundle.manifest, work, self.stages.vram)
        maps = 0
        if plan.how_decoded is not None:
            maps = tiled_bytes(config.vae, work.geometry.width, work.geometry.height) + TILES_ON_HOST
        check_host(work, maps)
        return plan

    def session(self, plan: Plan) -> AbstractContextManager[TensorRtSession]:
        session = TensorRtSession(self.stages, cast(ResidencyPlan, plan), self._worker)
        return scope(session, keeps=session.plan.keep_all and self.keep_loaded, free=self.release)

    def computation(self, plan: Plan) -> Computation:
        return Computation(TENSORRT, self.library)

    def release(self) -> None:
        self._worker.call(self.stages.release)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._worker.call(self.stages.close)
            self._worker.close()
