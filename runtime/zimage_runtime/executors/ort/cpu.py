"""The `cpu` executor: ONNX Runtime on whole-component programs. It is the reference, and always works."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import FloatArray
from ...bundle.bundle import Bundle
from ...bundle.manifest import CPU
from ...errors import ExecutorError
from ...machine.cores import thread_count
from ...machine.int8_products import ACTIVATION_LEVELS, activation_levels
from ...model.geometry import ImageGeometry, Rotary
from ...model.programs import SIGNATURES, Program
from ...tiles.kernels import NumpyTileKernels, TileKernels
from ..protocol import Conditioning, Plan
from .cpu_plan import plan_memory


class OrtCpuExecutor:
    """Sessions are made when first used and live until released."""

    def __init__(self, bundle: Bundle, *, low_memory: bool = False) -> None:
        """With `low_memory`, weights stay mapped from the file and are never copied into a faster layout."""
        self._bundle = bundle
        self._low_memory = low_memory
        self._sessions: dict[Program, Any] = {}

    @property
    def name(self) -> str:
        """The executor's name on the command line."""
        return CPU

    @property
    def loaded(self) -> set[Program]:
        """The programs that have a session now."""
        return set(self._sessions)

    def plan(self, geometry: ImageGeometry, prompt_tokens: int, batch_size: int = 1, *, encodes: bool = False) -> Plan:
        """See `Executor`."""
        return plan_memory(
            self._bundle.manifest, geometry, prompt_tokens, batch_size, low_memory=self._low_memory, encodes=encodes
        )

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        """See `Executor`."""
        feeds = {"inputs_embeds": embeddings, "cos": rotary.cos, "sin": rotary.sin}
        return self.run(Program.TEXT_ENCODER, feeds)["hidden_states"]

    def prepare(self, conditioning: Conditioning) -> "_OrtDenoiser":
        """See `Executor`."""
        rotary = conditioning.caption_rotary
        feeds = {"hidden_states": conditioning.hidden_states, "cos": rotary.cos, "sin": rotary.sin}
        caption = self.run(Program.CAPTION, feeds)["caption"]
        table = self.run(Program.MODULATION, {"timesteps": conditioning.timesteps})
        fixed = {
            "caption": caption,
            "image_cos": conditioning.image_rotary.cos,
            "image_sin": conditioning.image_rotary.sin,
            "caption_cos": rotary.cos,
            "caption_sin": rotary.sin,
        }
        return _OrtDenoiser(self, fixed, table["modulation"], table["final_scale"])

    def decode(self, latents: FloatArray) -> FloatArray:
        """See `Executor`."""
        return self.run(Program.DECODER, {"latents": latents})["image"]

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See `Executor`."""
        outputs = self.run(Program.ENCODER, {"image": image})
        return outputs["mean"], outputs["logvar"]

    def tile_kernels(self) -> TileKernels:
        """See `Executor`."""
        return NumpyTileKernels()

    def release(self, *programs: Program) -> None:
        """See `Executor`."""
        for program in programs or tuple(self._sessions):
            self._sessions.pop(program, None)

    def run(self, program: Program, feeds: dict[str, FloatArray]) -> dict[str, FloatArray]:
        """Runs one program: inputs and outputs by the names in `contracts`."""
        names = list(SIGNATURES[program].outputs)
        self.load(program)
        try:
            session = self._sessions[program]
            outputs: list[NDArray[np.float32]] = session.run(names, {**feeds, **_settings(session)})
        except Exception as error:  # the library's own classes share no base but Exception
            raise _explained(program, "failed", error) from None
        # the arrays lie in the session's arena, all of which lives for as long as one of them does: copies do not
        return {name: output.copy() for name, output in zip(names, outputs, strict=True)}

    def load(self, program: Program) -> None:
        """Makes a program's session, unless it has one."""
        if program not in self._sessions:
            self._sessions[program] = self._session(program)

    def _session(self, program: Program) -> Any:
        import onnxruntime

        path = self._bundle.program(program, CPU)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors reach the caller as exceptions; stderr is the command's own
        options.intra_op_num_threads = thread_count()
        options.enable_mem_pattern = False  # the second run would take another block as large as all activations
        disabled: list[str] = []
        if self._low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            disabled = _WIDENING
        try:
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
            )
        except Exception as error:
            raise _explained(program, f"cannot be loaded from {path}", error) from None


def _settings(session: Any) -> dict[str, NDArray[np.float32]]:
    """What this processor needs otherwise than a program has it: see `integers`."""
    if all(value.name != ACTIVATION_LEVELS for value in session.get_overridable_initializers()):
        return {}
    return {ACTIVATION_LEVELS: np.array(activation_levels(), np.float32)}


_WIDENING = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
"""The graph optimizations that would widen all bf16 or fp16 weights to float32 at once, at load."""


@dataclass(frozen=True)
class _OrtDenoiser:
    executor: OrtCpuExecutor
    fixed: dict[str, FloatArray]
    modulation: FloatArray  # [steps, blocks, 4, dim]
    final_scale: FloatArray  # [steps, dim]

    def __call__(self, latents: FloatArray, step: int) -> FloatArray:
        feeds = {
            "latents": latents,
            "modulation": self.modulation[step],
            "final_scale": self.final_scale[step],
            **self.fixed,
        }
        return self.executor.run(Program.DENOISER, feeds)["velocity"]


def _explained(program: Program, what: str, error: Exception) -> ExecutorError:
    text = " ".join(str(error).split())
    if "bad allocation" in text or "bad_alloc" in text or "Failed to allocate memory" in text:
        return ExecutorError(f"{program} {what}: out of memory; try a smaller --size or --low-memory")
    return ExecutorError(f"{program} {what}: {text[:300]}")
