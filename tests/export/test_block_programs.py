"""Block programs as ONNX: valid, without weights, one a shape, and W8A8 as exact as eight bits are."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_engines import session, twins
from parity import relative_error
from test_graphs_full_size import PUBLISHED

from zimage_export.engines.block_graphs import build_block, build_blocks
from zimage_export.engines.types import EngineTypes
from zimage_export.graphs import Target
from zimage_export.graphs.tensorrt_layers import TensorRtLayers
from zimage_export.storage.folds import BlockFold
from zimage_export.storage.precision import SCALE_SUFFIX
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import DType, TensorFile
from zimage_runtime.machine.gpu_targets import Variant
from zimage_runtime.model.block_signatures import BLOCK_SIGNATURES, block_dims
from zimage_runtime.model.blocks import all_blocks, main_blocks
from zimage_runtime.model.linears import Linear
from zimage_runtime.model.programs import Program


def types(
    storage: DType, variant: Variant = Variant.AMPERE, half: DType = DType.BF16, *, full: bool = False
) -> EngineTypes:
    def stored(component: str, name: str, shape: tuple[int, ...]) -> DType:
        quantized = component != "vae" and len(shape) == 2 and ("." in name and name.split(".")[0] in BLOCKS)
        return storage if storage is not DType.I8 or quantized else DType.F32

    return EngineTypes(stored, variant, half, full)


BLOCKS = ("layers", "noise_refiner", "context_refiner")


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("storage", [DType.BF16, DType.F16, DType.I8, DType.F32])
def test_programs_of_the_published_model_are_valid_and_few(storage: DType, variant: Variant) -> None:
    half = DType.F16 if variant is Variant.TURING else DType.BF16
    programs = build_blocks(PUBLISHED, types(storage, variant, half), {})
    assert len(programs) == 29
    assert {p.name: len(p.scalars) for p in programs if len(p.scalars) > 2} == {
        "text_layer": 35,
        "transformer_block": 34,
        "resnet": 13,
        "resnet_3": 3,
        "resnet_5": 4,
        "decoder_tile_2": 18,
        "decoder_tile_4": 6,
        "decoder_tile_6": 5,
    }
    assert {key for p in programs for key in p.scalars} == {place.key for place in all_blocks(PUBLISHED)}
    for program in programs:
        onnx.checker.check_model(program.model, full_check=True)
        assert len(program.model.SerializeToString()) < 100_000
        elements = {value.type.tensor_type.elem_type for value in program.model.graph.input}
        elements |= {int(a.i) for node in program.model.graph.node for a in node.attribute if a.name == "to"}
        if variant is Variant.TURING:
            assert onnx.TensorProto.BFLOAT16 not in elements, "Turing has no bf16"


def test_inputs_and_outputs_are_the_declared_ones() -> None:
    programs = {key: p for p in build_blocks(PUBLISHED, types(DType.BF16), {}) for key in p.scalars}
    for place in all_blocks(PUBLISHED):
        graph = programs[place.key].model.graph
        signature, dims = BLOCK_SIGNATURES[place.kind], block_dims(place, PUBLISHED)
        assert [value.name for value in graph.output] == list(signature.outputs)
        assert [value.name for value in graph.input][: len(signature.inputs)] == list(signature.inputs)
        for value in [*graph.output, *graph.input[: len(signature.inputs)]]:
            declared = {**signature.inputs, **signature.outputs}[value.name]
            found = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert found == [dims.get(d, d) if isinstance(d, str) else d for d in declared]


def test_every_weight_of_the_bundle_is_some_blocks_input(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    places = {place.key: place for place in all_blocks(opened.manifest.config)}
    fed: dict[str, set[str]] = {"text_encoder": set(), "transformer": set(), "vae": set()}
    for program in twins(opened):
        names = {value.name for value in program.model.graph.input} - set(BLOCK_SIGNATURES[program.kind].inputs)
        names = {part for name in names for part in program.parts.get(name, (name,))}
        for key, scalars in program.scalars.items():
            fed[program.kind.component] |= {places[key].tensor(name) for name in names - set(scalars)}
    for component, path in opened.manifest.weights.items():
        held = set(TensorFile(opened.file(path)).entries)
        by_host = {n for n in held if "adaLN" in n or n.startswith("t_embedder") or n.endswith("_pad_token")}
        assert fed[component] == held - by_host


def test_folds_are_scalars_and_share_a_program() -> None:
    folds = {"transformer": {"layers.0": BlockFold(3, 2), "layers.1": BlockFold(), "layers.2": BlockFold(0, 0, 4)}}
    programs = [p for p in build_blocks(PUBLISHED, types(DType.F16, half=DType.F16), folds) if "block" in p.name]
    assert [len(p.scalars) for p in programs] == [33, 1], "only what is divided at run time takes a program of its own"
    scalars = programs[0].scalars
    eps = PUBLISHED.transformer.norm_eps
    assert scalars["transformer_block:layers.0"] == {
        "attention_norm2.epsilon": eps / 4**3,
        "ffn_norm2.epsilon": eps / 4**2,
    }
    assert scalars["transformer_block:layers.1"] == {"attention_norm2.epsilon": eps, "ffn_norm2.epsilon": eps}


def test_a_block_stored_otherwise_gets_a_program_of_its_own() -> None:
    mixed = EngineTypes(
        lambda component, name, shape: (
            DType.BF16 if name.startswith("layers.7.") else types(DType.I8).stored(component, name, shape)
        ),
        Variant.AMPERE,
        DType.BF16,
    )
    programs = {p.name: p for p in build_blocks(PUBLISHED, mixed, {})}
    assert set(programs["transformer_block_2"].scalars) == {"transformer_block:layers.7"}
    assert len(programs["transformer_block"].scalars) == 33


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """[out, in] → int8 [out, in] and float32 [out], as block programs take them."""
    scale = np.abs(weight).max(axis=1) / 127
    return np.rint(weight / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def test_w8a8_is_the_product_of_what_was_quantized() -> None:
    """Against numpy in float64 on the same integers; a row of zeros, a loud row, a loud channel among them."""
    rng = np.random.default_rng(0)
    width, out, rows = 384, 96, 24
    x = rng.standard_normal((1, rows, width)).astype(np.float32)
    x[0, :, 5] *= 30
    x[0, 4] *= 1e4
    x[0, 3] = 0
    weight, scale = quantized(rng.standard_normal((out, width)) * rng.uniform(0.01, 1, (out, 1)))
    b = Target("tensorrt", types(DType.I8, full=True)).builder(Program.DENOISER, {"dim": width})
    layers = TensorRtLayers(b, DType.F32)
    with b.scope("layers.0.attention"):
        b.output(layers.linear("x", Linear("to_q", out, width)), "y")
    model = b.build().to_model_of_inputs("linear", {"x": (1, "tokens", "dim")}, {"y": (1, "tokens", out)})
    onnx.checker.check_model(model, full_check=True)
    name = "layers.0.attention.to_q.weight"
    (found,) = session(model).run(["y"], {"x": x, name: weight, f"{name}{SCALE_SUFFIX}": scale})
    wide = x.astype(np.float64)
    step = np.maximum(np.abs(wide).max(axis=-1, keepdims=True), 1e-30) / 127
    expected = (np.rint(wide / step) @ weight.T.astype(np.float64)) * step * scale
    assert np.isfinite(found).all()
    assert (found[0, 3] == 0).all()
    assert relative_error(found, expected) < 1e-6
    unquantized = wide @ (weight.T * scale[None, :].astype(np.float64))
    assert 1e-4 < relative_error(found[:, 8:], unquantized[:, 8:]) < 0.1


def test_a_w8a8_block_is_near_the_float_block(bundle: Path) -> None:
    """Eight bits cost a block's update about two percent here."""
    opened = Bundle.open(bundle)
    config = opened.manifest.config
    place = next(place for place in main_blocks(config) if place.name == "layers.1")
    weights = TensorFile(opened.file(opened.manifest.weights["transformer"]))
    rng = np.random.default_rng(1)
    tokens, half = 64, config.transformer.head_dim // 2
    angles = rng.uniform(0, 6, (1, tokens, half)).astype(np.float32)
    feeds = {"x": rng.standard_normal((1, tokens, config.transformer.dim), dtype=np.float32)}
    feeds |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    updates = []
    for storage in (DType.F32, DType.I8):
        graph = build_block(place, config, types(storage, full=True), {})
        inputs = dict(feeds)
        for name, shape in graph.weights.items():
            stem = name.removesuffix(SCALE_SUFFIX)
            parts = graph.parts.get(stem, (stem,))
            values = np.concatenate([weights.array(place.tensor(part))[0] for part in parts])
            if storage is DType.I8 and len(values.shape) == 2:
                inputs[name] = quantized(values)[name.endswith(SCALE_SUFFIX)]
            else:
                inputs[name] = values
            assert inputs[name].shape == shape
        inputs |= {name: np.full((1, 1, 1), value, np.float32) for name, value in graph.scalars.items()}
        signature = BLOCK_SIGNATURES[place.kind]
        model = graph.to_model_of_inputs("block", signature.inputs, signature.outputs)
        updates.append(session(model).run(["y"], inputs)[0] - feeds["x"])
    assert 1e-3 < relative_error(updates[1], updates[0]) < 0.03
