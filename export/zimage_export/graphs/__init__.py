"""The model stated as ONNX graphs without weights. One file per component; `layers` holds what they share."""

from collections.abc import Mapping, Sequence

from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.programs import MODEL_PROGRAMS, Program

from ..storage.folds import Folds
from ..storage.precision import StoragePolicy
from .builder import Graph
from .controlled import ControlledGraphs
from .target import PROGRAM_SETS, Target
from .text_encoder import TextEncoderGraph
from .transformer import TransformerGraphs
from .vae import VaeGraphs

__all__ = ["PROGRAM_SETS", "Graph", "Target", "build_graph", "build_graphs", "build_programs"]


def build_graph(program: Program, config: ModelConfig, target: Target) -> Graph:
    """One program of a model."""
    match program:
        case Program.TEXT_ENCODER:
            return TextEncoderGraph(config, target).build()
        case Program.CAPTION:
            return TransformerGraphs(config, target).caption()
        case Program.MODULATION:
            return TransformerGraphs(config, target).modulation()
        case Program.DENOISER:
            return TransformerGraphs(config, target).denoiser()
        case Program.DECODER:
            return VaeGraphs(config, target).decoder()
        case Program.ENCODER:
            return VaeGraphs(config, target).encoder()
        case Program.TIMESTEP:
            return ControlledGraphs(config, target).timestep()
        case Program.TOKENS:
            return ControlledGraphs(config, target).tokens()
        case Program.REFINERS:
            return ControlledGraphs(config, target).refiners()
        case _:
            raise ValueError(f"{program} is no program of a model")


def build_graphs(
    config: ModelConfig, target: Target | None = None, programs: Sequence[Program] = MODEL_PROGRAMS
) -> list[Graph]:
    """Programs of a model for one target: all of them, in float32 on the CPU, unless others are given."""
    return [build_graph(program, config, target or Target()) for program in programs]


def build_programs(config: ModelConfig, policy: StoragePolicy, folds: Mapping[str, Folds]) -> list[Graph]:
    """Every program that a bundle gets at once: what entries of the registry state for its precision."""
    return [
        graph
        for name, programs in PROGRAM_SETS.items()
        if not programs.extended
        for graph in build_graphs(config, Target(name, policy, folds), programs.of(policy.precision))
    ]
