"""ONNX Runtime on a device: what the executors for GPUs share, whatever the provider.

Caption tokens, rotary tables and the modulation table are copied to the device once a prompt and stay there for all
steps, where the provider's values can; latents and velocity, a megabyte each, are what crosses. Prompt embeddings are
gathered on the host, and the modulation program runs there. A session of the library holds its weights and its own
arena until it is released.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from ...adapters.branches import Branches
from ...arrays import FloatArray
from ...bundle.bundle import Bundle
from ...bundle.controlnet import ControlNet
from ...bundle.tensors import TensorFile
from ...errors import CancelledError, ExecutorError
from ...model.branches import ALL_EXTENDED
from ...model.config import VaeConfig
from ...model.geometry import Rotary
from ...model.programs import CONTROL_PROGRAMS, SIGNATURES, Program
from ...tiles.tiling import TiledDecoder, TiledEncoder
from ..protocol import Computation, Conditioning, Plan, Work
from ..turns import leaving, scope
from ..worker import Stop, Worker, forget_locals
from .control import ControlledSteps, controlled_steps, no_hints
from .control_programs import FOLLOWING, bundle_file, check_programs, control_file
from .cpu_plan import check_host
from .device import OrtDevice, Provider, checked, explained, run_bound
from .device_control import DeviceRunner
from .device_plan import VramPlan, tile_values
from .host_programs import HostPrograms, session_options
from .tile_kernels import OrtTileKernels

Result = TypeVar("Result")

_LEAST_RANK = 1
"""Of a branch without LoRA: zeros. Not every provider takes empty matrices."""

Rows = tuple[Mapping[str, Any], ...]
"""The modulation table on the device, one row per step."""


@dataclass
class OrtDeviceExecutor:
    """Programs are loaded when a session first needs them. Implements `Executor`."""

    name: str
    bundle: Bundle
    provider: Provider
    planned: Callable[[Work], VramPlan]  # raises `MemoryLimitError`
    budget: int  # bytes that may be held on the device
    denoiser: str  # the name under which the denoiser's program is that is loaded, or would be
    low_memory: bool = False  # for what runs on the host
    keep_loaded: bool = True
    device_name: str = "a GPU"
    _sessions: dict[Program, Any] = field(default_factory=dict, repr=False)
    _control: ControlNet | None = None  # whose programs are loaded, or were last
    _shrinks: str | None = field(init=False, repr=False)
    _host: HostPrograms = field(init=False, repr=False)
    _worker: Worker = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._shrinks = self.provider.shrinks
        self._host = HostPrograms(self.bundle, low_memory=self.low_memory)
        self._worker = Worker(f"zimage {self.name}")

    takes_lora = True
    takes_control = True

    @property
    def device(self) -> OrtDevice:
        """Where values are."""
        return self.provider.device

    @property
    def loaded(self) -> set[Program]:
        """The programs that have a session now, on the device or on the host."""
        return set(self._sessions) | self._host.loaded

    def plan(self, work: Work) -> VramPlan:
        plan = self.planned(work)
        check_host(work, plan.host)
        check_programs(self.bundle, work, self.name, plan.denoiser)
        return plan

    def session(self, plan: Plan) -> AbstractContextManager["DeviceSession"]:
        session = DeviceSession(self, cast(VramPlan, plan), self._worker)
        return scope(session, keeps=session.plan.keep_all and self.keep_loaded, free=self.release)

    def computation(self, plan: Plan) -> Computation:
        return Computation(cast(VramPlan, plan).denoiser, self.provider.library)

    def release(self) -> None:
        self._worker.call(self._release)

    def _release(self, *programs: Program) -> None:
        def free() -> None:
            for program in programs or tuple(self._sessions):
                self._sessions.pop(program, None)

        self.exclusively(free, Stop())
        self._host.release(*programs)

    def close(self) -> None:
        self.release()
        self._worker.close()

    def extend(self) -> None:
        self._worker.call(self.switch_to_extended)

    def switch_to_extended(self) -> None:
        """From now on, programs take LoRA and hints. What is loaded in its other form is freed. On the worker's
        thread."""
        if self._host.extend():
            self._release(*ALL_EXTENDED)

    @property
    def extended(self) -> bool:
        """Whether programs take LoRA and hints."""
        return self._host.extended

    def branch_inputs(self, branches: Branches | None, program: Program, least_rank: int = 0) -> dict[str, FloatArray]:
        """The inputs of a program for LoRA; none until they are extended."""
        return self._host.branch_inputs(branches, program, self.bundle.manifest, least_rank)

    def use_control(self, net: ControlNet) -> None:
        """From now on, a ControlNet's programs are those of `net`. Those of another one are freed."""
        self._host.use_control(net)
        if self._control != net:
            self._control = net
            self._release(*CONTROL_PROGRAMS)

    def exclusively(self, function: Callable[[], Result], stop: Stop) -> Result:
        """Runs what uses the device, in this thread's turn. All that it made there and does not return is freed by the
        end of the turn, even after an error."""
        with self.provider.exclusive(stop):
            try:
                return function()
            except BaseException as error:
                forget_locals(error)
                raise

    def enter(self, program: Program, plan: VramPlan) -> None:
        """Makes room for a program that is about to run."""
        gone = leaving(program, self.loaded, keep_all=plan.keep_all, keep_loaded=self.keep_loaded)
        if plan.denoiser != self.denoiser:
            gone |= set(FOLLOWING)
            self.denoiser = plan.denoiser
        if gone:
            self._release(*gone)

    def run_host(self, program: Program, feeds: Mapping[str, FloatArray], stop: Stop) -> dict[str, FloatArray]:
        """Runs a program on the host's processor."""
        return self._host.run(program, feeds, stop)

    def run_once(self, program: Program, feeds: Mapping[str, FloatArray], stop: Stop) -> dict[str, FloatArray]:
        """Runs a program whose inputs and outputs both cross."""
        self.load(program, stop)
        binding = self._binding(program, {name: self.device.wrapped(value) for name, value in feeds.items()}, stop)
        names = list(SIGNATURES[program].outputs)
        for name in names:
            binding.bind_output(name, self.device.kind, self.device.index)
        self._run(program, binding, stop, shrink=True)
        values = (self.device.download(value) for value in binding.get_outputs())
        return {name: self.checked(program, value) for name, value in zip(names, values, strict=True)}

    def run_bound(
        self,
        program: Program,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        stop: Stop,
        *,
        shrink: bool = False,
    ) -> None:
        """Runs a program on values of the device, into values of the device.

        With `shrink`, the arena gives back what the run took for activations.
        """
        binding = self._binding(program, inputs, stop)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._run(program, binding, stop, shrink)

    def _binding(self, program: Program, inputs: Mapping[str, Any], stop: Stop) -> Any:
        """Made for every run: it keeps its session alive, and takes microseconds."""
        self.load(program, stop)
        binding = self._sessions[program].io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def load(self, program: Program, stop: Stop) -> None:
        """Makes a program's session, unless it has one."""
        if program not in self._sessions:
            self._sessions[program] = self._session(program, stop)

    def checked(self, program: Program, values: FloatArray) -> FloatArray:
        """An output, looked at where a run may fail without an error."""
        return checked(program, values) if self.provider.checks_outputs else values

    def _run(self, program: Program, binding: Any, stop: Stop, shrink: bool) -> None:
        arena = self._shrinks if shrink else None
        try:
            run_bound(self._sessions[program], binding, f"{program} failed", stop, arena)
        except ExecutorError as error:
            if arena is None or "memory arena shrink list" not in str(error):
                raise
            # the CUDA provider as a plug-in has an arena of its own, and this is said before anything is run
            self._shrinks = None
            run_bound(self._sessions[program], binding, f"{program} failed", stop)

    def _session(self, program: Program, stop: Stop) -> Any:
        if self._control is not None and program in CONTROL_PROGRAMS:
            path, record = control_file(self._control, program, self.name, self.denoiser)
        else:
            path, record = bundle_file(self.bundle, program, self.name, self.denoiser, extends=self.extended)
        return self.open(str(path), f"{program} in {path}", stop, program, record.weight_bytes if record else 0)

    def open(self, model: str | bytes, what: str, stop: Stop, program: Program | None = None, nbytes: int = 0) -> Any:
        """A session of a program, by its file's path, or of another model, by its bytes."""
        options = session_options()
        try:
            with stop.aborting(lambda: options.set_load_cancellation_flag(True)):
                return self.provider.session(model, options, program, nbytes)
        except (CancelledError, ExecutorError):
            raise
        except Exception as error:
            stop.check()
            raise explained(f"{what} cannot be loaded", error) from None


@dataclass
class DeviceSession:
    """One request on the device. Implements `Session`."""

    executor: OrtDeviceExecutor
    plan: VramPlan
    worker: Worker
    stop: Stop = field(default_factory=Stop)
    _tables: dict[bytes, Rows] = field(default_factory=dict, repr=False)
    _uploaded: dict[int, tuple[FloatArray, Any]] = field(default_factory=dict, repr=False)

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        feeds = {"inputs_embeds": embeddings, "cos": rotary.cos, "sin": rotary.sin}
        return self._run_once(Program.TEXT_ENCODER, feeds)["hidden_states"]

    def denoiser(self, conditioning: Conditioning) -> "_DeviceDenoiser":
        return self.call(lambda: self._denoiser(conditioning))

    def _denoiser(self, conditioning: Conditioning) -> "_DeviceDenoiser":
        executor, device, rotary = self.executor, self.executor.device, conditioning.caption_rotary
        branches, control = conditioning.branches, conditioning.control
        model = executor.bundle.manifest.config
        runner = DeviceRunner(
            executor.provider, model.transformer.dim, self._run_step, lambda p, f: executor.run_host(p, f, self.stop)
        )
        if control is not None:
            executor.use_control(control.net)
        if branches is not None or control is not None:
            executor.switch_to_extended()
        executor.enter(Program.CAPTION, self.plan)
        executor.load(Program.CAPTION, self.stop)
        upload, dim = device.upload, executor.bundle.manifest.config.transformer.dim
        caption = device.empty((1, rotary.cos.shape[1], dim))
        fixed = {
            "caption": caption,
            "image_cos": upload(conditioning.image_rotary.cos),
            "image_sin": upload(conditioning.image_rotary.sin),
            "caption_cos": upload(rotary.cos),
            "caption_sin": upload(rotary.sin),
            **self._matrices(branches, Program.DENOISER),
            **(no_hints(runner.no_hint(), model) if executor.extended else {}),
        }
        feeds = {
            **self._matrices(branches, Program.CAPTION),
            "hidden_states": upload(conditioning.hidden_states),
            "cos": fixed["caption_cos"],
            "sin": fixed["caption_sin"],
        }
        executor.run_bound(Program.CAPTION, feeds, {"caption": caption}, self.stop, shrink=True)
        if executor.provider.checks_outputs:
            executor.checked(Program.CAPTION, device.download(caption))
        rows = self._modulation(conditioning.timesteps, branches)
        steps = controlled_steps(
            runner,
            conditioning,
            model,
            caption,
            {program: self._matrices(branches, program) for program in (Program.TOKENS, Program.REFINERS)},
            executor.branch_inputs(branches, Program.TIMESTEP),
        )
        return _DeviceDenoiser(self, fixed, rows, steps)

    def _run_step(self, program: Program, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self.executor.enter(program, self.plan)
        # what it took goes back, so that only one of a step's programs holds more than its weights
        self.executor.run_bound(program, inputs, outputs, self.stop, shrink=True)

    def _matrices(self, branches: Branches | None, program: Program) -> dict[str, Any]:
        """A program's LoRA on the device, once for all conditionings."""
        inputs = self.executor.branch_inputs(branches, program, _LEAST_RANK)
        return {name: self._matrix(values) for name, values in inputs.items()}

    def _matrix(self, values: FloatArray) -> Any:
        if id(values) not in self._uploaded:  # the array is kept, too, so that its id stays its own
            self._uploaded[id(values)] = values, self.executor.device.upload(values)
        return self._uploaded[id(values)][1]

    def _modulation(self, timesteps: FloatArray, branches: Branches | None) -> Rows:
        """The table of a schedule, which all conditionings of a request share."""
        key, upload = timesteps.tobytes(), self.executor.device.upload
        if key not in self._tables:
            inputs = self.executor.branch_inputs(branches, Program.MODULATION)
            table = self.executor.run_host(Program.MODULATION, {"timesteps": timesteps, **inputs}, self.stop)
            rows = zip(table["modulation"], table["final_scale"], strict=True)
            uploaded = ({"modulation": upload(row), "final_scale": upload(scale)} for row, scale in rows)
            self._tables = {key: tuple(uploaded)}
        return self._tables[key]

    def decode(self, latents: FloatArray) -> FloatArray:
        if not self.plan.tiled:
            return self._run_once(Program.DECODER, {"latents": latents})["image"]
        image = self._in_tiles(Program.DECODER, lambda: TiledDecoder(*self._tiled())(latents))
        return self.executor.checked(Program.DECODER, image)

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        if not self.plan.encodes_tiled:
            outputs = self._run_once(Program.ENCODER, {"image": image})
            return outputs["mean"], outputs["logvar"]
        mean, logvar = self._in_tiles(Program.ENCODER, lambda: TiledEncoder(*self._tiled())(image))
        return self.executor.checked(Program.ENCODER, mean), logvar

    def _run_once(self, program: Program, feeds: dict[str, FloatArray]) -> dict[str, FloatArray]:
        def task() -> dict[str, FloatArray]:
            self.executor.enter(program, self.plan)
            return self.executor.run_once(program, feeds, self.stop)

        return self.call(task)

    def _in_tiles(self, program: Program, function: Callable[[], Result]) -> Result:
        def task() -> Result:
            self.executor.enter(program, self.plan)
            return function()

        return self.call(task)

    def call(self, task: Callable[[], Result]) -> Result:
        """Runs what uses the device on the executor's thread, in its turn."""
        return self.worker.call(lambda: self.executor.exclusively(task, self.stop), self.stop)

    def _tiled(self) -> tuple[VaeConfig, TensorFile, OrtTileKernels]:
        executor, manifest = self.executor, self.executor.bundle.manifest
        weights = TensorFile(executor.bundle.file(manifest.weights["vae"]))
        return manifest.config.vae, weights, self.tile_kernels()

    def tile_kernels(self) -> OrtTileKernels:
        """What computes the tiles of an image that does not fit as a whole."""
        values = tile_values(self.plan.room, self.executor.bundle.manifest.config.vae)

        def open_tile(model: bytes) -> Any:
            return self.executor.open(model, "a tile's program", self.stop)

        return OrtTileKernels(self.executor.device, open_tile, values, self.stop)

    def cancel(self) -> None:
        self.stop.request()


@dataclass(frozen=True)
class _DeviceDenoiser:
    """The steps of one conditioning. Its values are no session's, so that stages may come and go between images."""

    session: DeviceSession
    fixed: Mapping[str, Any]  # caption tokens and rotary tables
    rows: Rows
    controlled: ControlledSteps[Any] | None

    def __call__(self, latents: FloatArray, step: int) -> FloatArray:
        return self.session.call(lambda: self._velocity(latents, step))

    def _velocity(self, latents: FloatArray, step: int) -> FloatArray:
        executor, stop = self.session.executor, self.session.stop
        uploaded = executor.device.upload(latents)
        inputs = {"latents": uploaded, **self.fixed, **self.rows[step]}
        if self.controlled is not None:
            inputs |= self.controlled.hints(uploaded, len(latents), step, self.rows[step]["modulation"])
        executor.enter(Program.DENOISER, self.session.plan)
        velocity = executor.device.empty(latents.shape)
        last = step == len(self.rows) - 1
        executor.run_bound(Program.DENOISER, inputs, {"velocity": velocity}, stop, shrink=last)
        return executor.checked(Program.DENOISER, executor.device.download(velocity))
