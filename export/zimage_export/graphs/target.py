"""What a program is built for: an executor, a precision, and the folds of its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from zimage_runtime.bundle.manifest import CPU, CUDA, CUDA_WEIGHT_ONLY, TENSORRT, Precision
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.programs import Program

from ..storage.folds import NO_FOLD, BlockFold, Folds
from ..storage.precision import StoragePolicy
from .builder import GraphBuilder
from .int4 import BlockCudaLayers, BlockLayers
from .int8 import Int8CudaLayers, Int8Layers, Int8WeightOnlyLayers
from .layers import CudaLayers, Layers
from .tensorrt_layers import TensorRtLayers

EXECUTORS = (CPU, CUDA)
"""The executors whose whole-component programs a bundle holds."""


class TypePolicy(Protocol):
    """Decides element types."""

    def storage(self, component: str, name: str, shape: tuple[int, ...]) -> DType:
        """The element type that a program gets a weight in."""

    def cuda_compute(self, component: str) -> DType:
        """What a GPU's programs of a component multiply in."""


@dataclass(frozen=True)
class Target:
    """Decides operators and element types, so that the graphs need not know of them."""

    executor: str = CPU
    policy: TypePolicy = field(default_factory=lambda: StoragePolicy(Precision.FP32))
    folds: Mapping[str, Folds] = field(default_factory=dict)  # by component

    def builder(self, program: Program, dims: Mapping[str, int]) -> GraphBuilder:
        """A builder for one program."""
        component = program.component
        return GraphBuilder(
            program, self.executor, dims, lambda name, shape: self.policy.storage(component, name, shape)
        )

    def layers(self, b: GraphBuilder) -> Layers:
        """The layers of a program. Modulation always runs on the CPU."""
        on_cpu = self.executor == CPU or b.program is Program.MODULATION
        policy = self.policy
        if self.executor == TENSORRT and not on_cpu:
            return TensorRtLayers(b, policy.cuda_compute(b.program.component))
        if isinstance(policy, StoragePolicy) and policy.precision is Precision.INT8:
            if self.executor == CUDA_WEIGHT_ONLY and not on_cpu:
                return Int8WeightOnlyLayers(b, policy=policy)
            return (Int8Layers if on_cpu else Int8CudaLayers)(b, policy=policy)
        if isinstance(policy, StoragePolicy) and policy.precision is Precision.INT4:
            return (BlockLayers if on_cpu else BlockCudaLayers)(b, policy=policy)
        if on_cpu:
            return Layers(b, DType.F32)
        return CudaLayers(b, policy.cuda_compute(b.program.component))

    def fold(self, component: str, block: str) -> BlockFold:
        """The folds of one block."""
        return self.folds.get(component, {}).get(block, NO_FOLD)
