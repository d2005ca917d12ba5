"""The model stated as ONNX graphs without weights. One file a component; `layers` holds what they share."""

from zimage_runtime.config import ModelConfig

from .builder import Graph, GraphBuilder
from .text_encoder import TextEncoderGraph
from .transformer import TransformerGraphs
from .vae import VaeGraphs

__all__ = ["Graph", "GraphBuilder", "TextEncoderGraph", "TransformerGraphs", "VaeGraphs", "build_graphs"]


def build_graphs(config: ModelConfig) -> list[Graph]:
    """Every program of a model, for the CPU executor."""
    return [
        TextEncoderGraph(config.text_encoder).build(),
        *TransformerGraphs(config.transformer).build(),
        *VaeGraphs(config.vae).build(),
    ]
