"""What an executor's layers file registers: how its programs are built, and which of them a bundle gets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.branches import ALL_EXTENDED
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program

from .builder import GraphBuilder
from .layers import Layers


class TypePolicy(Protocol):
    """Decides element types."""

    def storage(self, component: str, name: str, shape: tuple[int, ...]) -> DType:
        """The element type of a weight, as a program receives it."""

    def gpu_compute(self, component: str) -> DType:
        """The element type in which a GPU's programs of a component multiply."""


ON_HOST = (Program.MODULATION, Program.TIMESTEP)
"""The programs that always run on the CPU: what is computed once for a schedule."""

ON_DEVICE = tuple(program for program in MODEL_PROGRAMS if program not in ON_HOST)
"""The programs that a device runs."""

EXTENDED_ON_DEVICE = tuple(program for program in ALL_EXTENDED if program not in ON_HOST)
"""Those that also take LoRA and hints, and those for a ControlNet."""


@dataclass(frozen=True)
class ProgramSet:
    """The programs for one executor, or a further set for an executor that has several forms of a program."""

    name: str  # in the manifest and in file names
    layers: Callable[[GraphBuilder, TypePolicy], Layers]
    programs: tuple[Program, ...] = ON_DEVICE  # whole-component programs that a bundle gets
    precisions: tuple[Precision, ...] = tuple(Precision)  # of the bundles that get them
    widened: frozenset[DType] = frozenset()  # types of stored weights that are float32 in the executor's memory
    variant_of: str = ""  # the executor that has these further programs, if they are not its first
    extended: bool = False  # programs that take LoRA: a bundle gets them when they are asked for
    standard: bool = True  # onnx knows every operator, so that a program is checked down to every value's type

    @property
    def executor(self) -> str:
        """The executor that runs the programs."""
        return self.variant_of or self.name

    def of(self, precision: Precision) -> tuple[Program, ...]:
        """The programs that a bundle of a precision gets."""
        return self.programs if precision in self.precisions else ()
