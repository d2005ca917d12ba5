"""The layers of the CPU's programs: float32, or integers where the bundle stores integers."""

from zimage_runtime.bundle.manifest import CPU, Precision, extended
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.branches import ALL_EXTENDED
from zimage_runtime.model.programs import MODEL_PROGRAMS

from ..storage.precision import StoragePolicy
from .builder import GraphBuilder
from .int4 import BlockLayers
from .int8 import Int8Layers
from .layers import Layers
from .program_set import ProgramSet, TypePolicy


def _layers(b: GraphBuilder, policy: TypePolicy, *, extended: bool = False) -> Layers:
    match policy:
        case StoragePolicy(precision=Precision.INT8):
            return Int8Layers(b, policy=policy, extended=extended)
        case StoragePolicy(precision=Precision.INT4):
            return BlockLayers(b, policy=policy, extended=extended)
    return Layers(b, extended=extended)


def _extended_layers(b: GraphBuilder, policy: TypePolicy) -> Layers:
    return _layers(b, policy, extended=True)


_WIDENED = frozenset({DType.BF16, DType.F16})

CPU_PROGRAMS = ProgramSet(CPU, _layers, MODEL_PROGRAMS, widened=_WIDENED, standard=False)
CPU_EXTENDED = ProgramSet(
    extended(CPU), _extended_layers, ALL_EXTENDED, widened=_WIDENED, variant_of=CPU, extended=True, standard=False
)
