"""The `cuda` executor: ONNX Runtime on the programs for CUDA, which every GPU that it supports can run.

Caption tokens, rotary tables and the modulation table are copied to the GPU once a prompt and stay there for all
steps; latents and velocity, a megabyte each, are what crosses. Prompt embeddings are gathered on the host, and the
modulation program runs there. A session holds its weights and its own arena until it is released.

The GPU is behind `Device`: with the CPU in its place, the same code runs the same programs where there is no GPU.
"""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import FloatArray
from ...bundle.bundle import Bundle
from ...bundle.manifest import CUDA, Precision
from ...errors import DeviceLostError, ExecutorError
from ...machine.cores import thread_count
from ...machine.gpus import find_gpu
from ...model.geometry import ImageGeometry, Rotary
from ...model.programs import SIGNATURES, Program
from ...tiles.kernels import TileKernels
from ..protocol import Conditioning, Plan
from .cpu import OrtCpuExecutor
from .cpu_plan import check_tiles_on_host
from .device_plan import CONTEXT, plan_vram, tile_values
from .int8_denoiser import Capability, denoiser_programs, why_no_int8
from .tile_kernels import OrtTileKernels

PROVIDER = "CUDAExecutionProvider"

DISABLED_OPTIMIZERS = ["QDQSelectorActionTransformer"]
"""It turns a widened weight and its product into `MatMulNBits`: all weights would be repacked, on the host, at load."""


@dataclass(frozen=True)
class Device:
    """Where programs run and values stay."""

    kind: str = "cuda"  # as ONNX Runtime names it; "cpu" for tests
    index: int = 0

    def upload(self, values: FloatArray) -> Any:
        """A copy of an array on the device."""
        return self.wrapped(values.copy() if self.kind == "cpu" else np.ascontiguousarray(values))

    def wrapped(self, values: FloatArray) -> Any:
        """An array on the device: on the CPU the array's own memory, elsewhere a copy."""
        import onnxruntime

        try:
            return onnxruntime.OrtValue.ortvalue_from_numpy(values, self.kind, self.index)
        except Exception as error:  # the library's own classes share no base but Exception
            raise explained("copying to the GPU failed", error) from None

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Room for float32 values, which no session owns, so that it outlives them all."""
        import onnxruntime

        try:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self.kind, self.index)
        except Exception as error:
            raise explained("allocating on the GPU failed", error) from None

    def run(self, session: Any, binding: Any, output: str) -> FloatArray:
        """Runs what is bound, on values of the device, and copies an output from it."""
        binding.bind_output(output, self.kind, self.index)
        try:
            binding.synchronize_inputs()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:
            raise explained("a tile failed", error) from None
        return self.download(binding.get_outputs()[0])

    def download(self, value: Any) -> FloatArray:
        """A copy of a value of the device. (A view of a session's memory would keep all of its arena.)"""
        try:
            copy: FloatArray = value.numpy().copy()
        except Exception as error:
            raise explained("copying from the GPU failed", error) from None
        return copy


class OrtCudaExecutor:
    """Sessions are made when first used and live until released."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        budget: int,
        low_memory: bool = False,
        device: Device | None = None,
        capability: Capability | None = None,
        denoiser: str | None = None,
    ) -> None:
        """`budget` is what may be held on the GPU, in bytes; `low_memory` is for what runs on the host; `capability`
        is the GPU's, which is asked where it is not given. `denoiser` names one of an int8 bundle's two programs,
        which is otherwise chosen (`weight_only`).

        Raises `ExecutorError` for a GPU that is not there or cannot run the bundle.
        """
        self._bundle = bundle
        self._budget = budget
        self._device = device or Device()
        if capability is None and self._device.kind == "cuda" and bundle.manifest.precision is Precision.INT8:
            capability = find_gpu().capability
        if capability and (reason := why_no_int8(bundle.manifest.precision, capability)):
            raise ExecutorError(f"the GPU cannot run this bundle: {reason}")
        self._capability = capability
        self._fixed_denoiser = denoiser
        self._denoiser = denoiser or denoiser_programs(bundle.manifest, capability)[0]
        self._sessions: dict[Program, Any] = {}
        self._shrinks = self._device.kind == "cuda"  # whether sessions can give back what a run took
        self._host = OrtCpuExecutor(bundle, low_memory=low_memory)

    @property
    def name(self) -> str:
        """The executor's name on the command line."""
        return CUDA

    @property
    def loaded(self) -> set[Program]:
        """The programs that have a session now, on the GPU or on the host."""
        return set(self._sessions) | self._host.loaded

    def plan(self, geometry: ImageGeometry, prompt_tokens: int, batch_size: int = 1, *, encodes: bool = False) -> Plan:
        """See `Executor`."""
        plan = plan_vram(
            self._bundle.manifest,
            geometry,
            prompt_tokens,
            self._budget,
            batch_size,
            encodes=encodes,
            capability=self._capability,
            denoiser=self._fixed_denoiser,
        )
        check_tiles_on_host(geometry, plan.host)
        if plan.denoiser != self._denoiser:
            self._sessions.pop(Program.DENOISER, None)
            self._denoiser = plan.denoiser
        return plan

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        """See `Executor`."""
        feeds = {"inputs_embeds": embeddings, "cos": rotary.cos, "sin": rotary.sin}
        return self._run_once(Program.TEXT_ENCODER, feeds)["hidden_states"]

    def prepare(self, conditioning: Conditioning) -> "_CudaDenoiser":
        """See `Executor`."""
        self._load(Program.CAPTION)
        upload, rotary = self._device.upload, conditioning.caption_rotary
        config = self._bundle.manifest.config.transformer
        caption = self._device.empty((1, rotary.cos.shape[1], config.dim))
        fixed = {
            "caption": caption,
            "image_cos": upload(conditioning.image_rotary.cos),
            "image_sin": upload(conditioning.image_rotary.sin),
            "caption_cos": upload(rotary.cos),
            "caption_sin": upload(rotary.sin),
        }
        feeds = {
            "hidden_states": upload(conditioning.hidden_states),
            "cos": fixed["caption_cos"],
            "sin": fixed["caption_sin"],
        }
        self.run_bound(Program.CAPTION, feeds, {"caption": caption}, shrink=True)
        table = self._host.run(Program.MODULATION, {"timesteps": conditioning.timesteps})
        rows = tuple(
            {"modulation": upload(row), "final_scale": upload(scale)}
            for row, scale in zip(table["modulation"], table["final_scale"], strict=True)
        )
        return _CudaDenoiser(self, self._device, fixed, rows)

    def decode(self, latents: FloatArray) -> FloatArray:
        """See `Executor`."""
        return self._run_once(Program.DECODER, {"latents": latents})["image"]

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See `Executor`."""
        outputs = self._run_once(Program.ENCODER, {"image": image})
        return outputs["mean"], outputs["logvar"]

    def tile_kernels(self) -> TileKernels:
        """See `Executor`."""
        values = tile_values(self._budget, self._bundle.manifest.config.vae)
        return OrtTileKernels(self._device, lambda model: self._open(model, "a tile's program"), values)

    def release(self, *programs: Program) -> None:
        """See `Executor`."""
        for program in programs or tuple(self._sessions):
            self._sessions.pop(program, None)
        self._host.release(*programs)

    def _run_once(self, program: Program, feeds: dict[str, FloatArray]) -> dict[str, FloatArray]:
        """Runs a program whose inputs and outputs both cross."""
        self._load(program)
        binding = self._binding(program, {name: self._device.wrapped(value) for name, value in feeds.items()})
        names = list(SIGNATURES[program].outputs)
        for name in names:
            binding.bind_output(name, self._device.kind, self._device.index)
        self._run(program, binding, shrink=True)
        return {name: self._device.download(value) for name, value in zip(names, binding.get_outputs(), strict=True)}

    def run_bound(
        self, program: Program, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *, shrink: bool = False
    ) -> None:
        """Runs a program on values of the device, into values of the device.

        With `shrink`, the arena gives back what the run took for activations.
        """
        binding = self._binding(program, inputs)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._run(program, binding, shrink)

    def _binding(self, program: Program, inputs: Mapping[str, Any]) -> Any:
        """Made anew for every run: it keeps its session alive, and takes microseconds."""
        self._load(program)
        binding = self._sessions[program].io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _load(self, program: Program) -> None:
        if program not in self._sessions:
            self._sessions[program] = self._session(program)

    def _run(self, program: Program, binding: Any, shrink: bool) -> None:
        import onnxruntime

        shrink = shrink and self._shrinks
        options = onnxruntime.RunOptions()
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self._device.index}")
        try:
            binding.synchronize_inputs()
            self._sessions[program].run_with_iobinding(binding, options)
            binding.synchronize_outputs()
        except Exception as error:
            if shrink and "memory arena shrink list" in str(error):
                # the CUDA provider as a plug-in has an arena of its own, and this is said before anything is run
                self._shrinks = False
                self._run(program, binding, shrink=False)
                return
            raise explained(f"{program} failed", error) from None

    def _session(self, program: Program) -> Any:
        path = self._bundle.program(program, self._denoiser if program is Program.DENOISER else CUDA)
        return self._open(str(path), f"{program} in {path}")

    def _open(self, model: str | bytes, what: str) -> Any:
        """A session of a model, a file's path or its bytes."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors reach the caller as exceptions; stderr is the command's own
        options.intra_op_num_threads = thread_count()
        options.enable_mem_pattern = False  # the second run would take another block as large as all activations
        chatter = io.StringIO()  # the library prints, to stdout too, which is the command's own
        try:
            with contextlib.redirect_stdout(chatter):
                session = onnxruntime.InferenceSession(
                    model,
                    options,
                    providers=self._providers(),
                    enable_fallback=0,
                    disabled_optimizers=DISABLED_OPTIMIZERS,
                )
        except Exception as error:
            raise explained(f"{what} cannot be loaded", error) from None
        if self._device.kind == "cuda" and PROVIDER not in session.get_providers():
            # which the library says in its log alone, and then runs everything on the CPU
            raise ExecutorError(
                "ONNX Runtime could not start CUDA: a library of CUDA or cuDNN is missing or of another version; "
                "run `zimage-rt doctor`"
            )
        return session

    def _providers(self) -> list[Any]:
        if self._device.kind == "cpu":
            return ["CPUExecutionProvider"]
        preload_libraries()
        return [(PROVIDER, self.provider_options()), "CPUExecutionProvider"]

    def provider_options(self) -> dict[str, str]:
        """What ONNX Runtime's CUDA provider is told, for one session."""
        exact = self._bundle.manifest.precision is Precision.FP32
        return {
            "device_id": str(self._device.index),
            "arena_extend_strategy": "kSameAsRequested",  # the other one doubles, up to the next power of two
            "gpu_mem_limit": str(max(self._budget - CONTEXT, 1)),
            "cudnn_conv_algo_search": "HEURISTIC",  # the exhaustive one runs every algorithm for every new size
            "use_tf32": str(int(not exact)),  # 10 bits of fraction: plenty beside 16-bit weights, not for fp32
        }


@dataclass(frozen=True)
class _CudaDenoiser:
    """The steps of one conditioning. Its values are no session's, so the session may come and go between images."""

    executor: OrtCudaExecutor
    device: Device
    fixed: Mapping[str, Any]  # caption tokens and rotary tables
    rows: tuple[Mapping[str, Any], ...]  # of the modulation table, one a step

    def __call__(self, latents: FloatArray, step: int) -> FloatArray:
        velocity = self.device.empty(latents.shape)
        inputs = {"latents": self.device.upload(latents), **self.fixed, **self.rows[step]}
        last = step == len(self.rows) - 1
        self.executor.run_bound(Program.DENOISER, inputs, {"velocity": velocity}, shrink=last)
        return self.device.download(velocity)


_preloaded = False


def preload_libraries() -> str:
    """Loads CUDA and cuDNN from NVIDIA's wheels, once. Returns what the library complained of."""
    global _preloaded
    if _preloaded:
        return ""
    import onnxruntime

    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
    _preloaded = True
    return " ".join(chatter.getvalue().split())


_NO_MEMORY = (
    *("out of memory", "Failed to allocate memory", "smaller than requested bytes", "bad_alloc"),
    *("ALLOC_FAILED", "ALLOCATION_FAILED"),
)
_LOST = (
    *("illegal memory access", "unspecified launch failure", "illegal instruction", "misaligned address"),
    *("uncorrectable ECC", "hardware stack error", "device is lost", "GPU is lost", "unknown error", "device-side"),
    *("no longer available", "context is destroyed", "launch timed out", "driver shutting down"),
)


def explained(what: str, error: Exception) -> ExecutorError:
    """What ONNX Runtime's error means, in a line that says what to do."""
    text = " ".join(str(error).split())
    if any(sign in text for sign in _NO_MEMORY):
        return ExecutorError(
            f"{what}: the GPU is out of memory; close what else uses it, or try a smaller --size or --vram"
        )
    if any(sign in text for sign in _LOST):
        return DeviceLostError(f"{what}: the GPU was lost ({text[:200]}); run again, or restart the machine")
    return ExecutorError(f"{what}: {text[:300]}")
