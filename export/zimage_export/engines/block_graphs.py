"""The model as block programs for TensorRT, from the same definitions as the whole-component programs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import onnx

from zimage_runtime.bundle.manifest import TENSORRT, extended
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.block_signatures import BLOCK_SIGNATURES, EXTENDED_KINDS, block_dims
from zimage_runtime.model.blocks import BAND, MAP, MAP_OUT, BlockKind, BlockPlace, all_blocks
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.linears import block_linears
from zimage_runtime.model.norms import block_norms

from ..graphs.builder import Graph, GraphBuilder
from ..graphs.target import Target
from ..graphs.tensorrt_layers import TensorRtLayers
from ..graphs.text_encoder import TextEncoderGraph
from ..graphs.transformer import TransformerGraphs
from ..graphs.transformer_block import BlockGraphs, Tables
from ..graphs.vae import VaeGraphs
from ..storage.folds import Folds
from .types import EngineTypes


@dataclass(frozen=True)
class BlockProgram:
    """One program, and the blocks of the model that it serves."""

    name: str
    kind: BlockKind
    model: onnx.ModelProto
    scalars: dict[str, Mapping[str, float]]  # by the block's key, of every block that it serves
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of weights that several tensors make up
    branches: tuple[str, ...] = ()  # inputs of an extended program: LoRA's


def build_blocks(
    config: ModelConfig, types: EngineTypes, folds: Mapping[str, Folds], *, lora: bool = False
) -> list[BlockProgram]:
    """The programs for all blocks of a model, in the order of their first use; with `lora`, also those that take LoRA.

    Blocks whose programs are identical share one; a block whose weights are stored differently gets its own.
    """
    base = _build_all(all_blocks(config), config, types, folds, TENSORRT)
    if not lora:
        return base
    places = [place for place in all_blocks(config) if place.kind in EXTENDED_KINDS]
    return [*base, *_build_all(places, config, types, folds, extended(TENSORRT))]


def _build_all(
    places: Iterable[BlockPlace], config: ModelConfig, types: EngineTypes, folds: Mapping[str, Folds], executor: str
) -> list[BlockProgram]:
    programs: dict[bytes, BlockProgram] = {}
    suffix = executor.removeprefix(TENSORRT)
    for place in places:
        graph = build_block(place, config, types, folds, executor)
        signature = BLOCK_SIGNATURES[place.kind]
        model = graph.to_model_of_inputs(place.kind.value, signature.inputs, signature.outputs)
        text = model.SerializeToString(deterministic=True)
        if text not in programs:
            earlier = sum(program.kind is place.kind for program in programs.values())
            name = (place.kind.value if not earlier else f"{place.kind}_{earlier + 1}") + suffix
            programs[text] = BlockProgram(name, place.kind, model, {}, graph.parts, tuple(graph.branches))
        programs[text].scalars[place.key] = graph.scalars
    return list(programs.values())


def build_block(
    place: BlockPlace, config: ModelConfig, types: EngineTypes, folds: Mapping[str, Folds], executor: str = TENSORRT
) -> Graph:
    """One block's graph, for a key of `PROGRAM_SETS`."""
    prefix = f"{place.name}." if place.name else ""
    target = Target(executor, dataclasses.replace(types, prefix=prefix), folds)
    b = target.builder(place.kind.program, block_dims(place, config))
    if place.kind.component == "vae":
        _autoencoder_block(place, VaeGraphs(config, target), b, types.gpu_compute("vae"))
    else:
        _STATEMENTS[place.kind](place, config, target, b)
    return b.build()


def _autoencoder_block(place: BlockPlace, graphs: VaeGraphs, b: GraphBuilder, dtype: DType) -> None:
    signature = BLOCK_SIGNATURES[place.kind]
    if place.kind is BlockKind.MIDDLE_ATTENTION:
        _middle_attention(place, graphs, b, dtype)
        return
    x = next(iter(signature.inputs))
    if x == MAP:
        # convolutions run on channels-last maps: so no map is copied into another layout between blocks either
        x = b.op("Transpose", b.input(MAP, dtype), name="channels_first", perm=[0, 3, 1, 2])
    values = graphs.block(b, place, x)
    for name, value in zip(signature.outputs, values, strict=True):
        if name == MAP_OUT:
            value = b.op("Transpose", value, name="channels_last", perm=[0, 2, 3, 1])
        b.output(value, name, dtype if name == MAP_OUT else DType.F32)


def _middle_attention(place: BlockPlace, graphs: VaeGraphs, b: GraphBuilder, dtype: DType) -> None:
    layers = graphs.target.layers(b)
    assert isinstance(layers, TensorRtLayers)
    (norm,) = block_norms(place, graphs.config)
    positions = b.op("Reshape", b.input(MAP, dtype), b.integers(1, -1, place.channels), name="positions")
    values = layers.banded_attention(positions, b.input(BAND, dtype), norm, block_linears(place, graphs.config))
    b.output(values, MAP_OUT, dtype)


def _text_layer(place: BlockPlace, config: ModelConfig, target: Target, b: GraphBuilder) -> None:
    graph = TextEncoderGraph(config, target)
    shape = b.integers(0, 0, config.text_encoder.hidden_size)
    b.output(graph.layer(target.layers(b), "x", shape, target.fold("text_encoder", place.name)), "y")


def _transformer_block(place: BlockPlace, config: ModelConfig, target: Target, b: GraphBuilder) -> None:
    graph = BlockGraphs(config.transformer, target)
    shape, fold = b.integers(0, 0, config.transformer.dim), target.fold("transformer", place.name)
    b.output(graph.block(target.layers(b), "x", shape, graph.norms(b), Tables("cos", "sin"), fold), "y")


def _caption_embedder(place: BlockPlace, config: ModelConfig, target: Target, b: GraphBuilder) -> None:
    b.output(TransformerGraphs(config, target).embed_caption(target.layers(b)), "y")


def _image_embedder(place: BlockPlace, config: ModelConfig, target: Target, b: GraphBuilder) -> None:
    b.output(TransformerGraphs(config, target).embed_image(target.layers(b), "patches"), "y")


def _final_layer(place: BlockPlace, config: ModelConfig, target: Target, b: GraphBuilder) -> None:
    b.output(TransformerGraphs(config, target).final(target.layers(b), "x"), "patches")


_STATEMENTS: dict[BlockKind, Callable[[BlockPlace, ModelConfig, Target, GraphBuilder], None]] = {
    BlockKind.TEXT_LAYER: _text_layer,
    BlockKind.TRANSFORMER_BLOCK: _transformer_block,
    BlockKind.CAPTION_EMBEDDER: _caption_embedder,
    BlockKind.IMAGE_EMBEDDER: _image_embedder,
    BlockKind.FINAL_LAYER: _final_layer,
}
