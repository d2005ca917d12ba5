"""The `cpu` executor: ONNX Runtime on whole-component programs. It is the reference, and always works."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import numpy as np

from ...adapters.branches import Branches
from ...arrays import FloatArray
from ...bundle.bundle import Bundle
from ...bundle.manifest import CPU, Precision
from ...bundle.tensors import TensorFile
from ...errors import BundleError, RequestError
from ...machine.int8_products import activation_bits
from ...model.config import VaeConfig
from ...model.geometry import Rotary
from ...model.programs import Program
from ...tiles.kernels import NumpyTileKernels
from ...tiles.tiling import TiledDecoder, TiledEncoder
from ..examination import Examination, Verdict
from ..protocol import (
    Computation,
    Conditioning,
    ExecutorKind,
    Hardware,
    Options,
    Plan,
    Unavailable,
    Work,
)
from ..turns import leaving, scope
from ..worker import Stop, Worker
from .control import ControlledSteps, controlled_steps, no_hints
from .control_programs import check_programs
from .cpu_plan import MemoryPlan, plan_memory
from .host_programs import HostPrograms
from .slow_step import slow_step_notes

Result = TypeVar("Result")


@dataclass
class OrtCpuExecutor:
    """Programs are loaded when a session first needs them. Implements `Executor`."""

    bundle: Bundle
    low_memory: bool = False
    keep_loaded: bool = True
    programs: HostPrograms = field(init=False, repr=False)
    _worker: Worker = field(init=False, repr=False)
    _planned: dict[Program, int] = field(default_factory=dict, repr=False)  # of what is loaded, as it was planned

    def __post_init__(self) -> None:
        self.programs = HostPrograms(self.bundle, low_memory=self.low_memory)
        self._worker = Worker("zimage cpu")

    name = CPU
    device_name = "CPU"
    takes_lora = True
    takes_control = True

    @property
    def loaded(self) -> set[Program]:
        """The programs that have a session now."""
        return self.programs.loaded

    def plan(self, work: Work) -> MemoryPlan:
        manifest = self.bundle.manifest
        check_programs(self.bundle, work, CPU, CPU)
        plan = plan_memory(manifest, work, low_memory=self.low_memory, reusable=self._reusable())
        return replace(plan, notes=slow_step_notes(manifest, work))

    def _reusable(self) -> int:
        """Bytes of what is loaded: as planned, but never more than this process has."""
        planned = sum(self._planned[program] for program in self.programs.loaded)
        if not planned:
            return 0
        import psutil

        return min(planned, int(psutil.Process().memory_info().rss))

    def session(self, plan: Plan) -> AbstractContextManager["CpuSession"]:
        session = CpuSession(self, cast(MemoryPlan, plan), self._worker)
        return scope(session, keeps=session.plan.keep_all and self.keep_loaded, free=self.release)

    def enter(self, program: Program, plan: MemoryPlan) -> None:
        """Makes room for a program that is about to run."""
        gone = leaving(program, self.loaded, keep_all=plan.keep_all, keep_loaded=self.keep_loaded)
        if gone:
            self.programs.release(*gone)
        self._planned[program] = plan.programs.get(program, 0)

    def computation(self, plan: Plan) -> Computation:
        import onnxruntime

        int8 = self.bundle.manifest.precision is Precision.INT8
        return Computation(CPU, f"onnxruntime {onnxruntime.__version__}", activation_bits() if int8 else None)

    def extend(self) -> None:
        self._worker.call(self.programs.extend)

    def release(self) -> None:
        self._worker.call(self.programs.release)

    def close(self) -> None:
        self.release()
        self._worker.close()


@dataclass
class CpuSession:
    """One request on the CPU. Implements `Session`."""

    executor: OrtCpuExecutor
    plan: MemoryPlan
    worker: Worker
    stop: Stop = field(default_factory=Stop)
    _tables: dict[bytes, dict[str, FloatArray]] = field(default_factory=dict, repr=False)

    def run(
        self, program: Program, feeds: Mapping[str, FloatArray], outputs: Sequence[str] | None = None
    ) -> dict[str, FloatArray]:
        """Runs a program on the executor's thread. Without `outputs`, it gives all."""

        def task() -> dict[str, FloatArray]:
            self.executor.enter(program, self.plan)
            return self.executor.programs.run(program, feeds, self.stop, outputs)

        return self.worker.call(task, self.stop)

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        feeds = {"inputs_embeds": embeddings, "cos": rotary.cos, "sin": rotary.sin}
        return self.run(Program.TEXT_ENCODER, feeds)["hidden_states"]

    def denoiser(self, conditioning: Conditioning) -> "_CpuDenoiser":
        rotary, branches, control = conditioning.caption_rotary, conditioning.branches, conditioning.control
        programs, model = self.executor.programs, self.executor.bundle.manifest.config
        if control is not None:
            net = control.net
            self.worker.call(lambda: programs.use_control(net), self.stop)
        if branches is not None or control is not None:
            self.worker.call(programs.extend, self.stop)
        feeds = {"hidden_states": conditioning.hidden_states, "cos": rotary.cos, "sin": rotary.sin}
        caption = self.run(Program.CAPTION, feeds | self._inputs(branches, Program.CAPTION))["caption"]
        table = self._modulation(conditioning.timesteps, branches)
        steps = controlled_steps(
            self,
            conditioning,
            model,
            caption,
            {program: self._inputs(branches, program) for program in (Program.TOKENS, Program.REFINERS)},
            self._inputs(branches, Program.TIMESTEP),
        )
        fixed = {
            **self._inputs(branches, Program.DENOISER),
            **(no_hints(self.no_hint(), model) if programs.extended else {}),
            "caption": caption,
            "image_cos": conditioning.image_rotary.cos,
            "image_sin": conditioning.image_rotary.sin,
            "caption_cos": rotary.cos,
            "caption_sin": rotary.sin,
        }
        return _CpuDenoiser(self, fixed, table["modulation"], table["final_scale"], steps)

    def upload(self, values: FloatArray) -> FloatArray:
        return values

    def no_hint(self) -> FloatArray:
        return np.zeros((1, 1, self.executor.bundle.manifest.config.transformer.dim), np.float32)

    def run_host(self, program: Program, feeds: dict[str, FloatArray]) -> dict[str, FloatArray]:
        return self.run(program, feeds)

    def run_step(
        self, program: Program, inputs: Mapping[str, FloatArray], outputs: Mapping[str, tuple[int, ...]]
    ) -> dict[str, FloatArray]:
        return self.run(program, inputs, list(outputs))

    def _inputs(self, branches: Branches | None, program: Program) -> dict[str, FloatArray]:
        return self.executor.programs.branch_inputs(branches, program, self.executor.bundle.manifest)

    def _modulation(self, timesteps: FloatArray, branches: Branches | None) -> dict[str, FloatArray]:
        """The table of a schedule, which all conditionings of a request share."""
        key = timesteps.tobytes()
        if key not in self._tables:
            feeds = {"timesteps": timesteps} | self._inputs(branches, Program.MODULATION)
            self._tables = {key: self.run(Program.MODULATION, feeds)}
        return self._tables[key]

    def decode(self, latents: FloatArray) -> FloatArray:
        if not self.plan.tiled:
            return self.run(Program.DECODER, {"latents": latents})["image"]
        return self._in_tiles(Program.DECODER, lambda: TiledDecoder(*self._tiled())(latents))

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        if not self.plan.encodes_tiled:
            outputs = self.run(Program.ENCODER, {"image": image})
            return outputs["mean"], outputs["logvar"]
        return self._in_tiles(Program.ENCODER, lambda: TiledEncoder(*self._tiled())(image))

    def _in_tiles(self, program: Program, function: Callable[[], Result]) -> Result:
        def task() -> Result:
            self.executor.enter(program, self.plan)
            return function()

        return self.worker.call(task, self.stop)

    def _tiled(self) -> tuple[VaeConfig, TensorFile, NumpyTileKernels]:
        manifest = self.executor.bundle.manifest
        weights = TensorFile(self.executor.bundle.file(manifest.weights["vae"]))
        return manifest.config.vae, weights, NumpyTileKernels(check=self.stop.check)

    def cancel(self) -> None:
        self.stop.request()


@dataclass(frozen=True)
class _CpuDenoiser:
    session: CpuSession
    fixed: dict[str, FloatArray]  # caption tokens, rotary tables, LoRA's matrices
    modulation: FloatArray  # [steps, blocks, 4, dim]
    final_scale: FloatArray  # [steps, dim]
    controlled: ControlledSteps[FloatArray] | None

    def __call__(self, latents: FloatArray, step: int) -> FloatArray:
        feeds = {
            "latents": latents,
            "modulation": self.modulation[step],
            "final_scale": self.final_scale[step],
            **self.fixed,
        }
        if self.controlled is not None:
            feeds |= self.controlled.hints(latents, len(latents), step, feeds["modulation"])
        return self.session.run(Program.DENOISER, feeds)["velocity"]


def _why_unavailable(bundle: Bundle, device: int) -> Unavailable | None:
    if missing := bundle.manifest.missing(CPU):
        return Unavailable(f"{bundle.root} holds no {', '.join(missing)} program for cpu; export it again")
    return None


def _open(bundle: Bundle, options: Options) -> OrtCpuExecutor:
    if options.vram is not None:
        raise RequestError("vram is a budget for executors on a GPU; the cpu executor has none")
    if options.device:
        raise RequestError(f"device {options.device} is a GPU's number; the cpu executor uses none")
    return OrtCpuExecutor(bundle, low_memory=options.low_memory, keep_loaded=options.keep_loaded)


def _predict(bundle: Bundle, work: Work, hardware: Hardware) -> MemoryPlan:
    if reason := _why_unavailable(bundle, 0):
        raise BundleError(reason.reason)
    check_programs(bundle, work, CPU, CPU)
    return plan_memory(bundle.manifest, work, available=hardware.memory)


def _examine() -> Examination:
    bits = activation_bits()
    values = {"activation_bits": bits}
    if bits == 8:
        return Examination(Verdict.OK, "integer products are exact: int8 bundles run with 8-bit activations", values)
    text = "integer products saturate (no VNNI): int8 bundles run with 7-bit activations, slightly less accurate"
    return Examination(Verdict.NOTE, text, values)


KIND = ExecutorKind(
    on_gpu=False, why_unavailable=_why_unavailable, open=_open, predict=_predict, examine=_examine, takes_control=True
)
