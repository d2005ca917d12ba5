"""What a program is built for: an executor, a precision, and the folds of its weights; and the exporter's registry.

Another executor is a layers file that states a `ProgramSet`, and a line in `PROGRAM_SETS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from zimage_runtime.bundle.manifest import CPU, Precision
from zimage_runtime.model.programs import Program

from ..storage.folds import NO_FOLD, BlockFold, Folds
from ..storage.precision import StoragePolicy
from .builder import GraphBuilder
from .cpu_layers import CPU_EXTENDED, CPU_PROGRAMS
from .cuda_layers import (
    BLOCKS_EXTENDED,
    BLOCKS_PROGRAMS,
    CUDA_EXTENDED,
    CUDA_PROGRAMS,
    WEIGHT_ONLY_EXTENDED,
    WEIGHT_ONLY_PROGRAMS,
)
from .layers import Layers
from .program_set import ProgramSet, TypePolicy
from .tensorrt_layers import TENSORRT_EXTENDED, TENSORRT_PROGRAMS
from .webgpu_layers import FUSED_EXTENDED, FUSED_PROGRAMS, WEBGPU_EXTENDED, WEBGPU_PROGRAMS

PROGRAM_SETS: dict[str, ProgramSet] = {
    programs.name: programs
    for programs in (
        CPU_PROGRAMS,
        CUDA_PROGRAMS,
        WEIGHT_ONLY_PROGRAMS,
        BLOCKS_PROGRAMS,
        WEBGPU_PROGRAMS,
        FUSED_PROGRAMS,
        TENSORRT_PROGRAMS,
        CPU_EXTENDED,
        CUDA_EXTENDED,
        WEIGHT_ONLY_EXTENDED,
        BLOCKS_EXTENDED,
        WEBGPU_EXTENDED,
        FUSED_EXTENDED,
        TENSORRT_EXTENDED,
    )
}
"""The registry, by name and in the order in which a bundle's programs are built."""


@dataclass(frozen=True)
class Target:
    """Decides operators and element types, so that the graphs need not know of them."""

    executor: str = CPU  # a key of `PROGRAM_SETS`
    policy: TypePolicy = field(default_factory=lambda: StoragePolicy(Precision.FP32))
    folds: Mapping[str, Folds] = field(default_factory=dict)  # by component

    def builder(self, program: Program, dims: Mapping[str, int]) -> GraphBuilder:
        """A builder for one program."""
        component = program.component
        return GraphBuilder(
            program, self.executor, dims, lambda name, shape: self.policy.storage(component, name, shape)
        )

    def layers(self, b: GraphBuilder) -> Layers:
        """The layers of a program."""
        return PROGRAM_SETS[self.executor].layers(b, self.policy)

    def fold(self, component: str, block: str) -> BlockFold:
        """The folds of one block."""
        return self.folds.get(component, {}).get(block, NO_FOLD)
