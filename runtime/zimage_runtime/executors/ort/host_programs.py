"""Programs on the host's processor: sessions of ONNX Runtime that are made when first used and live until released."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...adapters.branches import NO_BRANCHES, Branches
from ...arrays import FloatArray
from ...bundle.bundle import Bundle
from ...bundle.controlnet import ControlNet
from ...bundle.manifest import CPU, extended
from ...errors import CancelledError, ExecutorError
from ...machine.cores import thread_count
from ...machine.int8_products import ACTIVATION_LEVELS, activation_levels
from ...model.branches import ALL_EXTENDED
from ...model.programs import CONTROL_PROGRAMS, Program
from ..worker import Stop

_WIDENING = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
"""The graph optimizations that would widen all bf16 or fp16 weights to float32 at once, at load."""


class HasPrograms(Protocol):
    """A bundle, or a ControlNet."""

    def program(self, program: Program, executor: str) -> Path:
        """The path of a program. Raises `BundleError` if there is none for the executor."""


class HostPrograms:
    """The CPU programs of a bundle, and of the ControlNet that it is used with."""

    def __init__(self, bundle: HasPrograms, *, low_memory: bool = False) -> None:
        """With `low_memory`, weights stay mapped from the file and are never copied into a faster layout."""
        self._bundle = bundle
        self._control: ControlNet | None = None
        self._low_memory = low_memory
        self._extended = False
        self._sessions: dict[Program, Any] = {}

    @property
    def loaded(self) -> set[Program]:
        """The programs that have a session now."""
        return set(self._sessions)

    def release(self, *programs: Program) -> None:
        """Frees what the programs hold; without arguments, everything."""
        self._free(programs or tuple(self._sessions))

    def _free(self, programs: Iterable[Program]) -> None:
        for program in programs:
            self._sessions.pop(program, None)

    @property
    def extended(self) -> bool:
        """Whether programs take LoRA: these, and those of a device that an executor runs beside them."""
        return self._extended

    def extend(self) -> bool:
        """From now on, programs take LoRA and hints. What is loaded in its other form is freed. Whether it was another
        before."""
        before, self._extended = self._extended, True
        if not before:
            self._free(ALL_EXTENDED)
        return not before

    def branch_inputs(self, branches: Branches | None, program: Program, least_rank: int = 0) -> dict[str, FloatArray]:
        """The inputs of a program for LoRA: none of them, until programs were extended; from then on, always."""
        if not self._extended:
            return {}
        assert isinstance(self._bundle, Bundle), "a ControlNet has no such programs"
        return (branches or NO_BRANCHES).inputs(program, self._bundle.manifest, least_rank)

    def use_control(self, net: ControlNet) -> None:
        """From now on, a ControlNet's programs are those of `net`. Those of another one are freed."""
        if self._control != net:
            self._control = net
            self._free(CONTROL_PROGRAMS)

    def run(
        self,
        program: Program,
        feeds: Mapping[str, FloatArray],
        stop: Stop | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, FloatArray]:
        """Runs one program: inputs and outputs by the names in `model.programs`. Without `outputs`, it gives all.

        Raises `ExecutorError`, or `CancelledError` within one operator's time of a request to stop.
        """
        import onnxruntime

        stop = stop or Stop()
        self.load(program, stop)
        session, options = self._sessions[program], onnxruntime.RunOptions()
        names = list(outputs or (value.name for value in session.get_outputs()))
        try:
            with stop.aborting(lambda: setattr(options, "terminate", True)):
                found: list[NDArray[np.float32]] = session.run(names, {**feeds, **_settings(session)}, options)
        except CancelledError:
            raise
        except Exception as error:  # the library's own classes share no base but Exception
            stop.check()
            raise _explained(program, "failed", error) from None
        # the arrays lie in the session's arena, all of which lives for as long as one of them does: copies do not
        return {name: output.copy() for name, output in zip(names, found, strict=True)}

    def load(self, program: Program, stop: Stop | None = None) -> None:
        """Makes a program's session, unless it has one."""
        if program not in self._sessions:
            self._sessions[program] = self._session(program, stop or Stop())

    def _session(self, program: Program, stop: Stop) -> Any:
        import onnxruntime

        name = extended(CPU) if self._extended and program in ALL_EXTENDED else CPU
        owner: HasPrograms = self._control if self._control and program in CONTROL_PROGRAMS else self._bundle
        path = owner.program(program, name)
        options = session_options()
        disabled: list[str] = []
        if self._low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            disabled = _WIDENING
        try:
            with stop.aborting(lambda: options.set_load_cancellation_flag(True)):
                return onnxruntime.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
                )
        except CancelledError:
            raise
        except Exception as error:
            stop.check()
            raise _explained(program, f"cannot be loaded from {path}", error) from None


def session_options() -> Any:
    """What every session of ours is made with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors reach the caller as exceptions; stderr is the command's own
    options.intra_op_num_threads = thread_count()
    options.enable_mem_pattern = False  # the second run would take another block as large as all activations
    return options


def _settings(session: Any) -> dict[str, NDArray[np.float32]]:
    """What this processor needs otherwise than a program has it: see `int8_products`."""
    if all(value.name != ACTIVATION_LEVELS for value in session.get_overridable_initializers()):
        return {}
    return {ACTIVATION_LEVELS: np.array(activation_levels(), np.float32)}


def _explained(program: Program, what: str, error: Exception) -> ExecutorError:
    text = " ".join(str(error).split())
    if "bad allocation" in text or "bad_alloc" in text or "Failed to allocate memory" in text:
        return ExecutorError(f"{program} {what}: out of memory; try a smaller --size or --low-memory")
    return ExecutorError(f"{program} {what}: {text[:300]}")
