"""The model stated as ONNX graphs without weights. One file a component; `layers` holds what they share."""

from collections.abc import Mapping

from zimage_runtime.bundle.manifest import CUDA_WEIGHT_ONLY, Precision
from zimage_runtime.model.config import ModelConfig

from ..storage.folds import Folds
from ..storage.precision import StoragePolicy
from .builder import Graph, GraphBuilder
from .target import EXECUTORS, Target
from .text_encoder import TextEncoderGraph
from .transformer import TransformerGraphs
from .vae import VaeGraphs

__all__ = [
    "EXECUTORS",
    "Graph",
    "GraphBuilder",
    "Target",
    "TextEncoderGraph",
    "TransformerGraphs",
    "VaeGraphs",
    "build_graphs",
    "build_weight_only",
]


def build_weight_only(config: ModelConfig, policy: StoragePolicy, folds: Mapping[str, Folds]) -> list[Graph]:
    """What a bundle holds beside the executors' programs: for int8, the denoiser that multiplies in fp16.

    The text encoder and the caption have few tokens, for which widening all weights would take longer than using them.
    """
    if policy.precision is not Precision.INT8:
        return []
    return [TransformerGraphs(config, Target(CUDA_WEIGHT_ONLY, policy, folds)).denoiser()]


def build_graphs(config: ModelConfig, target: Target | None = None) -> list[Graph]:
    """Every program of a model for one target: float32 on the CPU unless another is given."""
    target = target or Target()
    return [
        TextEncoderGraph(config, target).build(),
        *TransformerGraphs(config, target).build(),
        *VaeGraphs(config, target).build(),
    ]
