"""The model stated as ONNX graphs without weights. One file a component; `layers` holds what they share."""

from zimage_runtime.config import ModelConfig

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
]


def build_graphs(config: ModelConfig, target: Target | None = None) -> list[Graph]:
    """Every program of a model for one target: float32 on the CPU unless another is given."""
    target = target or Target()
    return [
        TextEncoderGraph(config.text_encoder, target).build(),
        *TransformerGraphs(config.transformer, target).build(),
        *VaeGraphs(config.vae, target).build(),
    ]
