"""The program files of a bundle: valid ONNX, named as the checkpoint is, without weights, with declared borders."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from zimage_export.source.checkpoint import Checkpoint
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import TensorFile, read_header, to_float32
from zimage_runtime.model.programs import COMPONENTS, MODEL_PROGRAMS, SIGNATURES, Program

# What the names in the signatures' shapes come to in the small checkpoint; all others are free
WIDTHS = {
    Program.TEXT_ENCODER: {"hidden_size": 64, "half_head": 16},
    Program.CAPTION: {"hidden_size": 64, "half_head": 16, "dim": 96},
    Program.MODULATION: {"blocks": 5, "dim": 96},
    Program.DENOISER: {"in_channels": 16, "half_head": 16, "dim": 96, "blocks": 5},
    Program.DECODER: {"latent_channels": 16},
    Program.ENCODER: {"latent_channels": 16},
}


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(checkpoint)


def load(opened: Bundle, program: Program) -> onnx.ModelProto:
    return onnx.load(opened.program(program, "cpu"), load_external_data=False)


def external(model: onnx.ModelProto) -> list[TensorProto]:
    return [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]


def program_files(opened: Bundle) -> list[Path]:
    return [opened.file(record.path) for records in opened.manifest.programs.values() for record in records.values()]


def test_every_program_is_valid_onnx(opened: Bundle) -> None:
    paths = program_files(opened)
    assert len(paths) >= len(MODEL_PROGRAMS)
    for path in paths:
        onnx.checker.check_model(str(path))


@pytest.mark.parametrize("program", MODEL_PROGRAMS)
def test_no_weights_inside(program: Program, opened: Bundle) -> None:
    model = load(opened, program)
    assert opened.program(program, "cpu").stat().st_size < 1_000_000
    inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert sum(len(t.SerializeToString()) for t in inside) < 10_000
    assert external(model)


@pytest.mark.parametrize("program", MODEL_PROGRAMS)
def test_weights_are_the_checkpoints_by_name_and_value(program: Program, opened: Bundle, source: Checkpoint) -> None:
    """External data points at the very tensor: the bytes at that offset are the checkpoint's values in float32."""
    path = opened.program(program, "cpu")
    weights = source.weights(program.component)
    for tensor in external(load(opened, program)):
        place = {entry.key: entry.value for entry in tensor.external_data}
        data = (path.parent / place["location"]).read_bytes()
        start, length = int(place["offset"]), int(place["length"])
        stored = np.frombuffer(data[start : start + length], np.float32).reshape(tuple(tensor.dims))
        expected = weights.get(tensor.name, tuple(tensor.dims)).read()
        # a power of two may have been divided out, which changes no bit of a value but its exponent
        assert any(np.array_equal(stored * np.float32(2**k), expected) for k in range(8)), tensor.name


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_every_tensor_of_the_checkpoint_is_used(component: str, opened: Bundle, source: Checkpoint) -> None:
    used = {t.name for p in MODEL_PROGRAMS if p.component == component for t in external(load(opened, p))}
    assert used == set(source.weights(component).names())


def test_what_the_text_encoder_leaves_out(opened: Bundle, source: Checkpoint) -> None:
    """The last of the four layers, the final norm, and the embeddings, which the host reads."""
    used = {t.name for t in external(load(opened, Program.TEXT_ENCODER))}
    left_out = set(source.text_encoder.names()) - used
    assert {name for name in left_out if not name.startswith("layers.3.")} == {"embed_tokens.weight", "norm.weight"}
    assert not any(name.startswith("layers.3.") for name in used)


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_weights_file_holds_what_the_programs_use_and_no_more(component: str, opened: Bundle) -> None:
    used = {t.name for p in MODEL_PROGRAMS if p.component == component for t in external(load(opened, p))}
    assert set(read_header(opened.file(opened.manifest.weights[component]))) == used


def test_embeddings_are_kept_as_published(opened: Bundle, source: Checkpoint) -> None:
    published = source.text_encoder.get("embed_tokens.weight")
    values, dtype = TensorFile(opened.file(opened.manifest.embeddings)).array("embed_tokens.weight")
    assert dtype == published.dtype == "BF16"
    np.testing.assert_array_equal(to_float32(values, dtype), published.read())


@pytest.mark.parametrize("program", MODEL_PROGRAMS)
def test_names_are_the_checkpoints(program: Program, opened: Bundle) -> None:
    """A linear layer or convolution is named as its weight, and so is the value that leaves it."""
    nodes = load(opened, program).graph.node
    names = [node.name for node in nodes]
    assert all(names)
    assert len(names) == len(set(names))
    layers = [node for node in nodes if node.op_type in ("Gemm", "Conv")]
    assert layers
    for node in layers:
        assert node.input[1] == f"{node.name}.weight"
        assert list(node.output) == [node.name]


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (Program.DENOISER, "layers.2.attention.to_q"),
        (Program.DENOISER, "noise_refiner.1.feed_forward.w2"),
        (Program.CAPTION, "context_refiner.0.attention.to_out.0"),
        (Program.MODULATION, "layers.0.adaLN_modulation.0"),
        (Program.TEXT_ENCODER, "layers.2.self_attn.k_norm"),
        (Program.DECODER, "decoder.up_blocks.0.resnets.1.conv1"),
        (Program.ENCODER, "encoder.mid_block.attentions.0.to_v"),
    ],
)
def test_names_a_reader_knows(program: Program, name: str, opened: Bundle) -> None:
    assert name in {node.name for node in load(opened, program).graph.node}


@pytest.mark.parametrize("program", MODEL_PROGRAMS)
def test_inputs_and_outputs_are_the_declared_ones(program: Program, opened: Bundle) -> None:
    graph = load(opened, program).graph
    for values, declared in ((graph.input, SIGNATURES[program].inputs), (graph.output, SIGNATURES[program].outputs)):
        assert [value.name for value in values] == list(declared)
        for value in values:
            tensor = value.type.tensor_type
            assert tensor.elem_type == TensorProto.FLOAT
            found = [d.dim_param or d.dim_value for d in tensor.shape.dim]
            assert found == [WIDTHS[program].get(d, d) for d in declared[value.name]]


@pytest.mark.parametrize("program", MODEL_PROGRAMS)
def test_the_manifest_knows_how_much_a_program_weighs(program: Program, opened: Bundle) -> None:
    total = sum(4 * int(np.prod(t.dims)) for t in external(load(opened, program)))
    assert opened.manifest.programs[program]["cpu"].weight_bytes == total
